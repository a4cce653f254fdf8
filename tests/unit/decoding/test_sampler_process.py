"""``process`` against the contract written out in plain float64 numpy, one token at a time."""

import math
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from paceline.server.decoding import sampler
from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import process
from paceline.server.engine.request import SamplingParams

torch.set_num_threads(1)

Scores = npt.NDArray[np.float64]


def make_row(
    prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), masked: tuple[int, ...] = (), **sampling: Any
) -> Row:
    return Row(SamplingParams(**sampling), prompt, output, masked, 0, len(prompt) + len(output))


class Ambiguous(Exception):  # noqa: N818
    """A threshold lies within rounding of a token: both answers are right."""


def reference(logits: Scores, row: Row) -> Scores:
    params, x = row.sampling, logits.astype(np.float64).copy()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in {*row.prompt_ids, *row.output_ids}:
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(row.output_ids):
        n = list(row.output_ids).count(token)
        x[token] -= params.presence_penalty + params.frequency_penalty * n
    if len(row.output_ids) < params.min_tokens:
        x[list(row.masked_until_min_tokens)] = -np.inf
    if params.temperature == 0:
        return x
    x = x / params.temperature
    x = reference_top_k(x, params.top_k)
    x = reference_top_p(x, params.top_p)
    return reference_min_p(x, params.min_p)


def keep_leading(x: Scores, count: int) -> Scores:
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    kept = np.full_like(x, -np.inf)
    kept[order[:count]] = x[order[:count]]
    return kept


def reference_top_k(x: Scores, k: int) -> Scores:
    return keep_leading(x, k) if k > 0 else x


def softmax(x: Scores) -> Scores:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def reference_top_p(x: Scores, p: float) -> Scores:
    if p >= 1:
        return x
    mass = 0.0
    for count, probability in enumerate(sorted(softmax(x), reverse=True), start=1):
        mass += probability
        if abs(mass - p) < 1e-5:
            raise Ambiguous
        if mass >= p:
            return keep_leading(x, count)
    raise AssertionError("the probabilities sum to less than p")


def reference_min_p(x: Scores, min_p: float) -> Scores:
    relative = np.exp(x - x.max())
    if (np.abs(relative - min_p) < 1e-5 * min_p).any():
        raise Ambiguous
    return np.where(relative >= min_p, x, -np.inf)


def assert_same_scores(actual: torch.Tensor, expected: Scores, *, shifted: bool) -> None:
    """Equal up to a constant if ``shifted``, with the same tokens removed."""
    got = actual.double().numpy()
    assert (np.isneginf(got) == np.isneginf(expected)).all(), f"{got} against {expected}"
    kept = ~np.isneginf(expected)
    offset = expected.max() - got.max() if shifted else 0.0
    np.testing.assert_allclose(got[kept] + offset, expected[kept], rtol=3e-6, atol=3e-6 * abs(offset) + 1e-6)


# Quarters and penalties of small denominators: different float64 values never become equal in fp32, so that
# ties are ties in both. -inf and +-1e4 are the extremes that steering and bias produce.
VALUES = st.one_of(
    st.integers(-24, 24).map(lambda n: n / 4), st.sampled_from([-math.inf, 1e4, -1e4, 88.0, 0.0, -0.0])
)


@st.composite
def rows_and_logits(draw: st.DrawFn) -> tuple[list[Row], npt.NDArray[np.float32]]:
    vocab = draw(st.integers(2, 12))
    tokens = st.lists(st.integers(0, vocab - 1), max_size=6).map(tuple)
    rows, logits = [], []
    for _ in range(draw(st.integers(1, 4))):
        values = draw(st.lists(VALUES, min_size=vocab, max_size=vocab))
        masked = draw(st.sets(st.integers(0, vocab - 1), max_size=vocab - 1))
        assume(any(math.isfinite(value) for at, value in enumerate(values) if at not in masked))
        bias = st.dictionaries(
            st.integers(0, vocab - 1), st.sampled_from([-100.0, -0.5, 2.0, 100.0]), max_size=3
        )
        rows.append(
            make_row(
                draw(tokens),
                draw(tokens),
                tuple(masked),
                logit_bias=draw(bias),
                repetition_penalty=draw(st.sampled_from([1.0, 1.0, 2.0, 0.5, 1.25])),
                presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.5])),
                frequency_penalty=draw(st.sampled_from([0.0, 0.25, -0.5])),
                min_tokens=draw(st.sampled_from([0, 0, 1, 4])),
                temperature=draw(st.sampled_from([0.0, 1.0, 0.5, 2.0, 0.0625, 0.7])),
                top_k=draw(st.sampled_from([0, 0, 1, 2, 3, 5, 100])),
                top_p=draw(st.sampled_from([1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.999])),
                min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0])),
            )
        )
        logits.append(values)
    return rows, np.array(logits, dtype=np.float32)


@settings(max_examples=250, deadline=None)
@given(case=rows_and_logits(), n_bins=st.sampled_from([1, 3, 2048]))
def test_process_follows_the_contract(case: tuple[list[Row], npt.NDArray[np.float32]], n_bins: int) -> None:
    rows, logits = case
    given_logits = torch.from_numpy(logits.copy())
    with mock.patch.object(sampler, "_BINS", n_bins):
        scores = process(given_logits, rows)
        alone = [process(given_logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert torch.equal(given_logits, torch.from_numpy(logits)), "the input was modified"
    for i, row in enumerate(rows):
        assert torch.equal(scores[i], alone[i]), "a row depends on the rows beside it"
        try:
            expected = reference(logits[i].astype(np.float64), row)
        except Ambiguous:
            continue
        assert_same_scores(scores[i], expected, shifted=row.sampling.temperature not in (0, 1))


OPERATIONS: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {0: -3.0, 2: 5.0}},
    "repetition": {"repetition_penalty": 2.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.75},
    "min_tokens": {"min_tokens": 9},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.3},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_changes_its_own_rows_only(name: str) -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.5, 3.0]] * 3)
    plain = make_row((0, 2), (1, 1), (4,))
    changed = make_row((0, 2), (1, 1), (4,), **OPERATIONS[name])
    scores = process(logits, [plain, changed, plain])
    assert torch.equal(scores[[0, 2]], logits[[0, 2]])
    assert not torch.equal(scores[1], logits[1])
    expected = reference(logits[1].double().numpy(), changed)
    assert_same_scores(scores[1], expected, shifted=name == "temperature")


def test_rows_that_ask_for_nothing_get_the_input_itself() -> None:
    logits = torch.randn(3, 7)
    warped_but_greedy = make_row(temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)
    done_with_min_tokens = make_row((), (1, 2), (3,), min_tokens=2)
    assert process(logits, [make_row(), warped_but_greedy, done_with_min_tokens]) is logits


@example(k=3)
@given(k=st.integers(1, 6))
def test_top_k_ties_keep_exactly_k_with_lower_ids(k: int) -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0, -5.0]])
    kept = process(logits, [make_row(top_k=k)])[0].isfinite().nonzero().flatten().tolist()
    assert kept == sorted([1, 2, 4, 5, 0, 3, 6][:k])


@pytest.mark.parametrize(
    ("p", "count"), [(0.0, 1), (0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.99, 4)]
)
def test_top_p_on_equal_tokens_keeps_the_fewest_with_lower_ids(p: float, count: int) -> None:
    logits = torch.tensor([[-math.inf, 2.0, 2.0, -math.inf, 2.0, 2.0]])
    kept = process(logits, [make_row(top_p=p)])[0].isfinite().nonzero().flatten().tolist()
    assert kept == [1, 2, 4, 5][:count]


def test_top_p_sees_the_distribution_that_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # After top_k = 2 the first token has 4/7 > 0.5: it is enough. Of the full distribution it would not be.
    assert process(logits, [make_row(top_k=2, top_p=0.5)])[0].isfinite().tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert process(logits, [make_row(top_p=0.5)])[0].isfinite().tolist() == [True, True, False, False]


def test_min_p_is_relative_to_the_maximum_after_temperature() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0]])
    assert process(logits, [make_row(min_p=0.2)])[0].isfinite().tolist() == [True, True, False]
    cold = process(logits, [make_row(min_p=0.2, temperature=0.5)])
    assert cold[0].isfinite().tolist() == [True, False, False]


def test_min_p_of_one_keeps_every_maximum() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.9, 2.0]])
    assert process(logits, [make_row(min_p=1.0)])[0].isfinite().tolist() == [False, True, False, True]


def test_large_flat_and_peaked_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=generator) * torch.tensor([[0.1], [3.0], [500.0]])
    scores = process(logits, [make_row(top_p=0.9)] * 3)
    leading = process(logits, [make_row(top_k=1500)] * 3)
    for i in range(3):
        x = logits[i].double().numpy()
        assert_same_scores(leading[i], reference_top_k(x, 1500), shifted=False)
        expected = reference_top_p(x, 0.9)
        assert_same_scores(scores[i], expected, shifted=False)
    assert scores[0].isfinite().sum() > 2048 > scores[1].isfinite().sum()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_tiny_temperature_and_huge_logits_stay_numbers(temperature: float) -> None:
    logits = torch.tensor([[3.0, 3e38, -3e38, 3e38, -math.inf], [1.0, 2.0, 3.0, 3.0, -1.0]])
    scores = process(logits, [make_row(temperature=temperature, top_p=0.9)] * 2)
    assert not scores.isnan().any()
    assert scores.softmax(-1)[0].tolist() == [0, 0.5, 0, 0.5, 0]
    assert scores.softmax(-1)[1].tolist() == [0, 0, 0.5, 0.5, 0]


def test_penalties_see_the_drafted_prefix_of_each_row() -> None:
    prompt = (0,)
    rows = [
        make_row(prompt, output, presence_penalty=1.0, repetition_penalty=2.0)
        for output in ((), (1,), (1, 2))
    ]
    scores = process(torch.full((3, 4), 4.0), rows)
    assert scores.tolist() == [[2, 4, 4, 4], [2, 1, 4, 4], [2, 1, 1, 4]]
