"""Figures of the load generator from hand-made streams: no clock, no socket."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.clients.stats import Percentiles, Sample, summarize, weighted_percentile
from paceline.clients.stream import Recorder, ServerError, sse_data


def chunk(text: str = "", *, usage: int | None = None, finish: str | None = None) -> dict[str, Any]:
    """A chat chunk; ``usage`` is the running (or final) count of generated tokens."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    counts = None if usage is None else {"completion_tokens": usage, "prompt_tokens": 7}
    return {"choices": [choice], "usage": counts}


def final_usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 7}}


def record(*arrivals: tuple[float, dict[str, Any]], start: float = 10.0) -> Sample:
    """The sample of chunks that arrive at these times after the request."""
    recorder = Recorder(start)
    for after, data in arrivals:
        recorder.feed(start + after, data)
    return recorder.sample(start + arrivals[-1][0])


def flat(sample: Sample) -> list[float]:
    """Seconds per token and tokens of each gap, in one list."""
    return [number for gap in sample.token_gaps for number in gap]


def test_continuous_usage_gives_exact_tokens_per_chunk() -> None:
    sample = record(
        (0.1, chunk("", usage=0)),  # the role: no token yet
        (0.5, chunk("a", usage=1)),
        (0.8, chunk("bcd", usage=4)),
        (1.0, chunk("e", usage=5, finish="length")),
        (1.0, final_usage(5)),
    )
    assert sample.ttft_s == pytest.approx(0.5)
    assert sample.e2e_s == pytest.approx(1.0)
    assert flat(sample) == pytest.approx([0.1, 3, 0.2, 1])
    assert (sample.output_tokens, sample.prompt_tokens, sample.counted_by) == (5, 7, "continuous_usage")


def test_a_token_without_text_counts_where_the_running_count_shows_it() -> None:
    sample = record(
        (0.2, chunk("", usage=1)), (0.3, chunk("é", usage=2)), (0.4, chunk("", usage=2, finish="stop"))
    )
    assert sample.ttft_s == pytest.approx(0.2)
    assert flat(sample) == pytest.approx([0.1, 1])
    assert sample.output_tokens == 2


def test_final_usage_is_spread_over_the_chunks() -> None:
    sample = record((0.2, chunk("ab")), (0.6, chunk("cd", finish="stop")), (0.6, final_usage(4)))
    assert flat(sample) == pytest.approx([0.2, 2])
    assert (sample.output_tokens, sample.counted_by) == (4, "usage")


def test_without_usage_chunks_are_counted_and_it_says_so() -> None:
    sample = record((0.2, chunk("a")), (0.3, chunk("b")), (0.4, chunk("", finish="stop")))
    assert (sample.output_tokens, sample.prompt_tokens, sample.counted_by) == (2, 0, "chunks")


@pytest.mark.parametrize("field", ["content", "reasoning_content", "tool_calls"])
def test_every_kind_of_output_is_a_token(field: str) -> None:
    value: Any = [{"index": 0}] if field == "tool_calls" else "x"
    sample = record((0.25, {"choices": [{"index": 0, "delta": {field: value}, "finish_reason": "stop"}]}))
    assert sample.ttft_s == pytest.approx(0.25)


def test_completions_chunks_carry_text_directly() -> None:
    sample = record((0.25, {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}))
    assert sample.ttft_s == pytest.approx(0.25)
    assert sample.output_tokens == 1


def test_an_error_inside_the_stream_is_raised() -> None:
    with pytest.raises(ServerError, match="inside the stream: out of blocks"):
        Recorder(0.0).feed(1.0, {"error": {"message": "out of blocks", "type": "server_error"}})


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n")), max_size=5), st.data())
def test_events_survive_any_split_of_the_bytes(texts: list[str], data: st.DataObject) -> None:
    wire = b": ping\n\n" + b"".join(b"data: " + text.strip().encode() + b"\r\n\r\n" for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))

    async def reads() -> AsyncIterator[bytes]:
        for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            yield wire[begin:end]

    async def collect() -> list[bytes]:
        return [payload async for _, payload in sse_data(reads())]

    assert asyncio.run(collect()) == [text.strip().encode().strip() for text in texts]


@pytest.mark.parametrize(
    ("pairs", "q", "expected"),
    [
        ([], 0.5, None),
        ([(3.0, 0.0)], 0.5, None),
        ([(5.0, 1.0)], 0.99, 5.0),
        ([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)], 0.5, 2.0),
        ([(1.0, 1.0), (2.0, 1.0)], 0.5, 1.0),
        ([(9.0, 1.0), (1.0, 8.0)], 0.5, 1.0),
        ([(9.0, 1.0), (1.0, 99.0)], 0.99, 1.0),
        ([(9.0, 2.0), (1.0, 98.0)], 0.99, 9.0),
    ],
)
def test_weighted_percentile(pairs: list[tuple[float, float]], q: float, expected: float | None) -> None:
    assert weighted_percentile(pairs, q) == expected


def test_summary_of_a_level() -> None:
    samples = [
        Sample(100.0, 2.0, 0.5, ((0.1, 3.0), (0.3, 1.0)), 40, 7, "usage"),
        Sample(101.0, 4.0, 0.7, (), 20, 7, "usage"),
        Sample(100.5, 9.0, error="HTTP 429: queue full"),
    ]
    stats = summarize("2", samples)
    assert (stats.requests, stats.errors, stats.error_messages) == (3, 1, {"HTTP 429: queue full": 1})
    assert stats.duration_s == pytest.approx(9.5)  # the failed request took the machine's time as well
    assert (stats.prompt_tokens, stats.output_tokens) == (14, 60)
    assert stats.output_tok_s == pytest.approx(60 / 9.5, abs=1e-3)
    assert stats.ttft_ms == Percentiles(500.0, 700.0)
    assert stats.itl_ms == Percentiles(100.0, 300.0)
    assert stats.tpot_ms == Percentiles(150.0, 150.0)  # 0.6 s for 4 tokens; the median gap is 0.1 s
    assert stats.e2e_ms == Percentiles(2000.0, 4000.0)
    assert stats.request_tok_s == Percentiles(5.0, 5.0)  # 20 and 5 tok/s: nearest rank, and the slow tail
    assert stats.counted_by == ("usage",)


def test_a_level_where_everything_failed_has_no_figures() -> None:
    stats = summarize("1", [Sample(0.0, 0.1, error="refused")])
    assert (stats.output_tok_s, stats.ttft_ms, stats.itl_ms) == (
        0.0,
        Percentiles(None, None),
        Percentiles(None, None),
    )
