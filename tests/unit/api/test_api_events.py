"""Merging, closing and completing engine iterators, without HTTP."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fake_engine import logprob

from paceline.server.api.disconnect import ClientGone, until_disconnect
from paceline.server.api.events import MergedEvents, PromptEvent, concatenate, with_prompt_logprobs
from paceline.server.api.sse import frame
from paceline.server.engine.request import TokenEvent

SCORES = (logprob(1, None, 1), logprob(2, -1.0, 1))


async def _listed(events: list[PromptEvent]) -> AsyncIterator[PromptEvent]:
    for item in events:
        yield item


def test_other_choices_wait_for_the_prompt_s_logprobs() -> None:
    late = TokenEvent(0, "c", (3,), prompt_logprobs=SCORES)
    arriving = [
        (0, TokenEvent(1, "a", (1,))),
        (0, TokenEvent(1, "b", (2,), finish_reason="stop")),
        (1, TokenEvent(0, "x", (9,), prompt_logprobs=())),
        (0, late),
        (0, TokenEvent(0, "d", (4,))),
    ]

    async def scenario() -> list[tuple[int, int, str, object]]:
        return [
            (prompt, event.choice, event.text, event.prompt_logprobs)
            async for prompt, event in with_prompt_logprobs(_listed(arriving))
        ]

    assert asyncio.run(scenario()) == [
        (1, 0, "x", ()),
        (0, 1, "a", SCORES),
        (0, 1, "b", None),
        (0, 0, "c", SCORES),
        (0, 0, "d", None),
    ]


def test_concatenation_keeps_what_only_one_event_has() -> None:
    events = [
        TokenEvent(2, "a", (1,), logprobs=SCORES[1:], prompt_logprobs=SCORES, cached_tokens=5),
        TokenEvent(2, "", (), logprobs=()),
        TokenEvent(2, "b", (2, 3), logprobs=SCORES, finish_reason="length"),
    ]
    assert concatenate(events) == TokenEvent(
        2,
        "ab",
        (1, 2, 3),
        logprobs=(SCORES[1], *SCORES),
        prompt_logprobs=SCORES,
        finish_reason="length",
        cached_tokens=5,
    )
    assert concatenate([TokenEvent(0, "", (), finish_reason="stop")]).logprobs is None


def test_closing_at_once_reaches_iterators_that_never_ran() -> None:
    """A cancelled task that has not begun runs nothing of its body, not even a ``finally``."""

    class Source:
        closed = False

        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> TokenEvent:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        async def aclose(self) -> None:
            self.closed = True

    async def scenario() -> list[bool]:
        sources = [Source(), Source()]
        await MergedEvents(sources).aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return [source.closed for source in sources]

    assert asyncio.run(scenario()) == [True, True]


def test_hang_up_waits_for_the_clean_up_of_the_work() -> None:
    async def scenario() -> list[str]:
        log: list[str] = []

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)  # Clean-up code may await.
                log.append("cleaned up")

        messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

        async def receive() -> dict[str, str]:
            await asyncio.sleep(0)
            return next(messages)

        with pytest.raises(ClientGone):
            await until_disconnect(receive, work())
        return log

    assert asyncio.run(scenario()) == ["cleaned up"]


def test_a_result_wins_over_a_hang_up_at_the_same_moment() -> None:
    async def work() -> int:
        return 7

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    assert asyncio.run(until_disconnect(receive, work())) == 7


def test_a_frame_is_one_line_whatever_the_text() -> None:
    text = "a\nb\r\n\u2028data: [DONE]\n\nü"
    raw = frame({"text": text})
    assert raw.startswith(b"data: {")
    assert raw.endswith(b"}\n\n")
    assert raw.count(b"\n") == 2
    assert "ü".encode() in raw
