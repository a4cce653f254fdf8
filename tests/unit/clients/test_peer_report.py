"""Figures, ratios and tables of the side-by-side bench."""

import io

from rich.console import Console

from paceline.clients.machine import busy_share, cpu_model, versions
from paceline.clients.peer_report import Board, Key, prefill_speed, ratio_table, table
from paceline.clients.stats import LevelStats, Sample, summarize


def level(tokens: int, *, streams: int = 1, ttft_s: float = 0.5, prompt: int = 100) -> LevelStats:
    """One request of 1 s."""
    return summarize(str(streams), [Sample(0.0, 1.0, ttft_s, ((0.01, 1.0),), tokens, prompt)])


def board(**rounds: list[LevelStats]) -> Board:
    """Ours is ``plain`` and ``drafted``; ``llama_a``, ``llama_b`` and ``other`` are peers."""
    families = {"plain": "ours", "drafted": "ours", "llama_a": "llama", "llama_b": "llama", "other": "other"}
    made = Board(families={name: families[name] for name in rounds})
    for name, figures in rounds.items():
        for stats in figures:
            made.add(Key(name, "short", int(stats.level)), stats)
    return made


def test_ratios_are_medians_of_paired_rounds() -> None:
    made = board(plain=[level(n) for n in (100, 90, 80)], other=[level(n) for n in (50, 10, 80)])  # 2, 9, 1
    mine, its = Key("plain", "short", 1), Key("other", "short", 1)
    assert made.ratio(mine, its) == 2.0
    assert made.ratio(mine, Key("other", "long", 1)) is None
    ours, peer = made.rows()
    assert (peer["ours_over_it"], ours["ours_over_it"]) == ({"plain": 2.0}, {})
    assert (ours["output_tok_s"], ours["output_tok_s_rounds"]) == (90.0, [100.0, 90.0, 80.0])
    assert (peer["ttft_ms_p50"], peer["itl_ms_p50"]) == (500.0, 10.0)
    assert (peer["requests"], peer["errors"]) == (3, 0)


def test_the_share_is_that_of_the_decode_step_at_one_stream() -> None:
    made = board(plain=[level(90), level(400, streams=16)])
    made.ceilings_tok_s["plain"] = 200.0
    one, many = made.rows()
    assert (one["ceiling_tok_s"], one["share_of_ceiling"]) == (200.0, 0.5)  # 10 ms per token
    assert (many["ceiling_tok_s"], many["share_of_ceiling"]) == (None, None)


def test_bursts_do_not_look_like_speed() -> None:
    burst = Sample(0.0, 1.0, 0.5, ((0.0, 1.0), (0.0, 1.0), (0.06, 1.0)), 4, 100)
    made = board(plain=[summarize("1", [burst])])
    made.ceilings_tok_s["plain"] = 100.0
    (row,) = made.rows()
    assert (row["itl_ms_p50"], row["tpot_ms_p50"], row["share_of_ceiling"]) == (0.0, 20.0, 0.5)


def test_prefill_is_prompt_tokens_over_ttft_at_one_stream() -> None:
    assert prefill_speed(level(5, ttft_s=0.25, prompt=1000)) == 4000.0
    assert prefill_speed(level(5, streams=4)) is None
    assert prefill_speed(level(5, prompt=0)) is None


def test_ours_are_compared_with_the_best_of_each_family() -> None:
    made = board(
        plain=[level(100)],
        drafted=[level(150, ttft_s=0.4)],
        llama_a=[level(40, ttft_s=0.1)],
        llama_b=[level(50, ttft_s=0.2)],
        other=[level(10)],
    )
    found = {(r["contender"], r["figure"], r["over"]): (r["best"], r["ratio"]) for r in made.ours_over_best()}
    assert found == {
        ("plain", "output_tok_s", "llama"): ("llama_b", 2.0),
        ("plain", "prefill_tok_s", "llama"): ("llama_a", 0.2),
        ("plain", "output_tok_s", "other"): ("other", 10.0),
        ("plain", "prefill_tok_s", "other"): ("other", 1.0),
        ("drafted", "output_tok_s", "ours"): ("plain", 1.5),
        ("drafted", "prefill_tok_s", "ours"): ("plain", 1.25),
        ("drafted", "output_tok_s", "llama"): ("llama_b", 3.0),
        ("drafted", "prefill_tok_s", "llama"): ("llama_a", 0.25),
        ("drafted", "output_tok_s", "other"): ("other", 15.0),
        ("drafted", "prefill_tok_s", "other"): ("other", 1.25),
    }


def test_the_spread_is_that_of_blocks_in_which_each_had_each_place() -> None:
    # A machine that gets slower: whoever comes second in a round loses a tenth. Rounds are B A, A B, ...
    ours, peer = [90, 90, 72, 72], [100, 81, 80, 64.8]
    made = board(plain=[level(n) for n in (*ours, 1)], other=[level(int(10 * n)) for n in (*peer, 1)])
    spread = made.spread(Key("plain", "short", 1), Key("other", "short", 1))
    assert spread is not None
    assert (spread.blocks, spread.mean, spread.standard_error) == (
        2,
        0.0994,
        0.0,
    )  # the fifth round has no partner
    (record,) = [r for r in made.ours_over_best() if r["figure"] == "output_tok_s"]
    assert record["spread"] == {"mean": 0.0994, "standard_error": 0.0, "blocks": 2}


def test_the_spread_tells_how_far_blocks_are_apart() -> None:
    made = board(plain=[level(n) for n in (100, 100, 110, 110, 120, 120)], other=[level(100)] * 6)
    spread = made.spread(Key("plain", "short", 1), Key("other", "short", 1))
    assert spread is not None
    assert spread == (1.1, round(0.1 / 3**0.5, 4), 3)


def test_no_spread_without_two_blocks_or_with_a_round_that_failed() -> None:
    failed = summarize("1", [Sample(0.0, 1.0, error="refused")])
    few = board(plain=[level(100)] * 3, other=[level(100)] * 3)
    broken = board(plain=[level(100)] * 6, other=[*[level(100)] * 5, failed])
    for made in (few, broken):
        assert made.spread(Key("plain", "short", 1), Key("other", "short", 1)) is None


def test_a_peer_without_answers_is_not_the_best_of_anything() -> None:
    failed = summarize("1", [Sample(0.0, 1.0, error="refused")])
    made = board(plain=[level(100)], llama_a=[failed], llama_b=[level(20)])
    assert [r["best"] for r in made.ours_over_best()] == ["llama_b", "llama_b"]
    assert made.rows()[1]["output_tok_s"] is None
    assert made.rows()[1]["errors"] == 1


def test_the_tables_show_everything_best_first() -> None:
    made = board(plain=[level(100)], other=[level(200)])
    made.add(Key("plain", "long", 1), level(7, prompt=1000))
    shown = io.StringIO()
    console = Console(file=shown, width=150)
    console.print(table(made.rows()))
    console.print(ratio_table(made.ours_over_best()))
    lines = shown.getvalue().splitlines()
    rows = [line.split("│")[1:4] for line in lines if line.count("│") > 8]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["short", "1", "other"],
        ["short", "1", "plain"],
        ["long", "1", "plain"],
    ]
    assert any("2000" in line for line in lines)  # 1,000 tokens in 0.5 s
    assert any("0.50x" in line and "tok/s" in line for line in lines)


def test_machine_facts() -> None:
    assert versions()["paceline"] != "not installed"
    assert cpu_model()
    share = busy_share(0.05)
    assert share is None or 0 <= share <= 1
