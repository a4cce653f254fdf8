"""From answers to figures, against sums done by hand; which prompts are taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.evaluate.answers import Answer, Block, Pass
from paceline.draftmodels.evaluate.figures import Measured, Rival, acceptance, expected_tokens, summarize
from paceline.draftmodels.evaluate.prompts import BUILT_IN, dataset, read

#: Two blocks: 1 of 3 accepted (two positions examined), and 2 of 2 (both examined).
BLOCKS = (Block("d", 3, 1, (0.9, 0.3)), Block("d", 2, 2, (0.8, 0.6)))


def answer(
    category: str, tokens: int, forwards: int, seconds: float = 1.0, blocks: tuple[Block, ...] = ()
) -> Answer:
    return Answer(0, category, tuple(range(tokens)), forwards, seconds, blocks)


def test_acceptance_by_hand() -> None:
    # The prompt's forward and one that drafted nothing commit a token each, the blocks 1 + 1 and 2 + 1.
    found = acceptance([answer("a", 1 + 1 + 2 + 3, 3, blocks=BLOCKS)], 3)

    assert found.alpha == pytest.approx((0.9 + 0.3 + 0.8 + 0.6) / 4)
    assert found.alpha_per_position == (2 / 2, 1 / 2, None)
    assert found.overlap_per_position == pytest.approx((0.85, 0.45, None))
    assert found.examined_per_position == (2, 2, 0)
    assert found.acceptance_histogram == (0, 1, 1, 0)
    assert (found.num_spec_steps, found.num_draft_tokens, found.num_accepted_draft_tokens) == (2, 5, 3)
    assert found.draft_acceptance_rate == 3 / 5
    assert found.tau == 6 / 3
    a = 0.65
    assert found.tau_formula == pytest.approx(((1 + a + a**2 + a**3) + (1 + a + a**2) + 1) / 3)


def test_nothing_drafted_leaves_no_rate_and_tau_one() -> None:
    found = acceptance([answer("a", 5, 4)], 2)
    assert (found.alpha, found.draft_acceptance_rate, found.tau_formula) == (None, None, None)
    assert (found.tau, found.alpha_per_position, found.acceptance_histogram) == (1.0, (None, None), (0, 0, 0))
    assert acceptance([answer("a", 1, 0)], 2).tau is None


def test_unknown_overlaps_leave_the_counts() -> None:
    found = acceptance([answer("a", 7, 3, blocks=(Block("d", 3, 1), Block("d", 2, 2)))], 3)
    assert (found.alpha, found.tau_formula, found.overlap_per_position) == (None, None, (None, None, None))
    assert found.alpha_per_position == (1.0, 0.5, None)


def test_the_formula() -> None:
    assert expected_tokens(0.0, 4) == 1.0
    assert expected_tokens(1.0, 4) == 5.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)


def test_speed_is_the_median_over_rounds_of_paired_ratios_per_category_and_in_total() -> None:
    def one(seconds: float, per_answer: float) -> Pass:
        return Pass((answer("a", 10, 9, per_answer), answer("b", 30, 29, 2 * per_answer)), seconds)

    examined = Pass((answer("a", 10, 9), answer("b", 30, 29)), 1.0)
    rounds = ((one(2, 1), one(4, 1.5)), (one(1, 1), one(4, 4.0)), (one(2, 1), one(2, 2.0)))
    result = summarize(Measured(0.0, examined, rounds), 2, seeded=False)

    total = result.total.speed
    assert total is not None
    assert total.rounds == ((20.0, 10.0), (40.0, 10.0), (20.0, 20.0))
    assert (total.tokens_per_second, total.tokens_per_second_without, total.speedup) == (20.0, 10.0, 2.0)
    assert list(result.categories) == ["a", "b"]
    category = result.categories["a"].speed
    assert category is not None
    assert category.rounds[1:] == ((10.0, 2.5), (10.0, 5.0))
    assert category.rounds[0] == pytest.approx((10.0, 10 / 1.5))
    assert category.speedup == 2.0
    assert result.same_text == (2, 2)


def test_a_draft_is_compared_with_another_by_the_mean_ratio_of_their_rounds() -> None:
    def one(seconds: float, tokens: int = 10) -> Pass:
        return Pass((answer("a", tokens, 9, seconds),), seconds)

    measured = Measured(0.0, one(9.0), (), Rival(Pass((answer("a", 7, 3, blocks=BLOCKS),), 9.0)))
    untimed = summarize(measured, 3, seeded=False).against
    assert untimed is not None
    assert (untimed.ratio, untimed.standard_error, untimed.group.speed) == (None, None, None)

    # The draft takes 1 s and 2 s, the other one 1.25 s and 4 s, none 2 s and 4 s.
    measured = measured.with_round(one(1.0), one(2.0), one(1.25)).with_round(one(2.0), one(4.0), one(4.0))
    result = summarize(measured, 3, seeded=False)
    found = result.against
    assert found is not None
    assert found.ratios == (1.25, 2.0)
    assert (found.ratio, found.standard_error) == pytest.approx((1.625, 0.375))
    assert found.group.acceptance.acceptance_histogram == (0, 1, 1, 0)
    assert found.group.speed is not None
    assert found.group.speed.rounds == ((8.0, 5.0), (2.5, 2.5))
    assert result.total.speed is not None
    assert result.total.speed.speedup == 2.0
    assert result.same_text == (1, 1)


def test_the_other_draft_must_not_change_the_text_either() -> None:
    def one(tokens: int) -> Pass:
        return Pass((answer("a", tokens, 4),), 1.0)

    measured = Measured(0.0, one(5), (), Rival(one(5))).with_round(one(5), one(5), one(6))
    assert summarize(measured, 2, seeded=False).same_text == (0, 1)


def test_equal_texts_are_compared_only_where_they_must_be_equal() -> None:
    on, off = (
        Pass((answer("a", 5, 4), answer("a", 6, 5)), 1.0),
        Pass((answer("a", 5, 4), answer("a", 7, 6)), 1.0),
    )
    for temperature, seeded, expected in ((0.0, False, (1, 2)), (1.0, True, (1, 2)), (1.0, False, None)):
        assert summarize(Measured(temperature, on, ((on, off),)), 2, seeded=seeded).same_text == expected
    assert summarize(Measured(0.0, on, ()), 2, seeded=False).same_text is None
    assert summarize(Measured(0.0, on, ()), 2, seeded=False).total.speed is None


class Letters:
    """A tokenizer of single characters, without a chat template."""

    vocab_size, eos_ids, sha256, has_chat_template = 0x110000, frozenset({0}), "letters", False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]


def text_of(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.tokens))


def test_the_built_in_set_has_six_categories_of_eight_that_take_turns() -> None:
    tokenizer: Any = Letters()
    prompts = read(BUILT_IN, tokenizer)
    assert len({p.tokens for p in prompts}) == len(prompts) == 48
    assert len({p.category for p in prompts[:6]}) == 6
    assert [p.category for p in prompts[42:]] == [p.category for p in prompts[:6]]
    assert read(BUILT_IN, tokenizer, 4) == prompts[:4]
    lengths = [len(p.tokens) for p in prompts]
    assert max(lengths) > 5 * min(lengths)


def test_categories_of_a_file_take_turns(tmp_path: Path) -> None:
    tokenizer: Any = Letters()
    path = tmp_path / "some.jsonl"
    lines = [{"prompt": name, "category": name[0]} for name in ("a1", "a2", "a3", "b1", "c1", "c2")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [text_of(p) for p in read(str(path), tokenizer)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert [text_of(p) for p in read(str(path), tokenizer, 2)] == ["a1", "b1"]
    assert (dataset(str(path)), dataset(BUILT_IN)) == ("some.jsonl", "paceline-chat")
