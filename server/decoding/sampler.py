"""From raw logits to scores, and from scores to tokens.

Owns the order of sampling operations of the HTTP contract, up to and including min_p, and the draw. Pure
functions over rows: logits are fp32 [R, V] on any device, ``rows[i]`` describes logits[i], and a row's result
never depends on the rows beside it. Knows nothing of drafts, sequences or the engine. Each operation touches
only the rows that ask for it.

*Scores* are logits up to a constant per row: a sampled row is drawn from softmax(scores).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from paceline.server.decoding.noise import gumbel
from paceline.server.decoding.rows import Row, is_greedy, is_seeded, is_unseeded

#: Below this a temperature is as good as it: no two different fp32 logits survive the division together.
_MIN_TEMPERATURE = 1e-30
#: top_k and top_p sort tokens into bins of 1/64 nat below the maximum; all beyond 32 nats share the last bin.
_BINS = 2048
_BINNED_NATS = 32.0


def process(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Apply every sampling operation in the order of the HTTP contract.

    Greedy rows take no temperature, top_k, top_p or min_p. The input is never modified; if no row asks for
    anything it is returned as it is.

    Args:
        logits: fp32 [R, V], combined logits of the model.
        rows: R rows.

    Returns:
        Scores, fp32 [R, V]; removed tokens are -inf.
    """
    assert logits.dim() == 2, f"logits must be [R, V], got {list(logits.shape)}"
    assert len(rows) == logits.shape[0], f"{len(rows)} rows for {logits.shape[0]} rows of logits"
    edits = [(op, chosen) for needs, op in _OPERATIONS if (chosen := _indices(rows, needs))]
    if not edits:
        return logits
    scores = logits.clone()
    for op, chosen in edits:
        _apply_(op, scores, rows, chosen)
    return scores


def needs_temperature_at_most(row: Row) -> bool:
    """Whether no operation of ``process`` but temperature changes the row."""
    return not any(needs(row) for needs, op in _OPERATIONS if op is not _temperature_)


def smallest_temperature(row: Row) -> float:
    """The row's temperature, not so small that it would divide to infinity."""
    return max(row.sampling.temperature, _MIN_TEMPERATURE)


def draw(scores: Tensor, rows: Sequence[Row], generator: torch.Generator) -> Tensor:
    """Choose one token per row.

    Greedy rows take the argmax (lowest id among equals), seeded rows the argmax of scores plus Gumbel noise,
    the others a sample of softmax(scores) by ``generator``, which is left untouched if there are none.

    Args:
        scores: fp32 [R, V] from ``process``.
        rows: R rows.
        generator: numbers for the unseeded rows; may live on another device.

    Returns:
        int64 [R] token ids.
    """
    sampled = _indices(rows, is_unseeded)
    if len(sampled) == len(rows):
        return sample(_weights(scores), generator)
    seeded = _indices(rows, is_seeded)
    # torch documents that argmax returns the first of equal maxima: ties keep the lower id.
    tokens = (_with_noise(scores, rows, seeded) if seeded else scores).argmax(dim=-1)
    if sampled:
        tokens[sampled] = sample(_weights(scores[sampled]), generator)
    return tokens


def probabilities(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """The distribution each row's token is drawn from: fp32 [R, V], one-hot for greedy rows."""
    greedy = _indices(rows, is_greedy)
    if not greedy:
        return scores.softmax(dim=-1)
    result = torch.zeros_like(scores)
    result[greedy, scores[greedy].argmax(dim=-1)] = 1.0
    others = _indices(rows, lambda row: not is_greedy(row))
    if others:
        result[others] = scores[others].softmax(dim=-1)
    return result


def sample(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index per row with probability proportional to its weight, by inversion of the cumulative sum.

    One uniform per row instead of one per token: eight times quicker than ``torch.multinomial`` at V = 49k on
    a CPU.

    Args:
        weights: fp32 [R, V], not negative, each row with a positive finite sum.
        generator: source of the uniforms (float64).

    Returns:
        int64 [R]; never an index of weight zero.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    totals = cumulative[:, -1:]
    uniforms = random_uniforms((weights.shape[0], 1), generator, weights.device)
    # The first index whose sum exceeds u * total; u <= 1 - 2**-53, so in float64 u * total stays below the total.
    return torch.searchsorted(cumulative, uniforms * totals, right=True).squeeze(1)


def keep_top_p_(scores: Tensor, top_p: Sequence[float]) -> None:
    """Keep each row's nucleus: the fewest tokens, most likely first, that have ``top_p`` of softmax(scores).

    Args:
        scores: fp32 [R, V], changed in place; removed tokens become -inf.
        top_p: R shares.
    """
    shares = torch.tensor(top_p, dtype=torch.float64, device=scores.device).unsqueeze(1)
    _keep_leading_(scores, _weights(scores), lambda total: shares * total)


def random_uniforms(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """float64 uniforms in [0, 1) on ``device``, drawn where the generator lives."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(device)


def _indices(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> list[int]:
    return [index for index, row in enumerate(rows) if wanted(row)]


def _weights(scores: Tensor) -> Tensor:
    """softmax(scores) without its division: the largest weight of a row is 1."""
    return (scores - scores.amax(dim=-1, keepdim=True)).exp_()


def _with_noise(scores: Tensor, rows: Sequence[Row], seeded: list[int]) -> Tensor:
    chosen = [rows[index] for index in seeded]
    seeds = [row.sampling.seed for row in chosen if row.sampling.seed is not None]
    noise = gumbel(
        seeds,
        [row.choice for row in chosen],
        [row.position for row in chosen],
        scores.shape[1],
        scores.device,
    )
    if len(seeded) == len(rows):
        return noise.add_(scores)
    noisy = scores.clone()
    noisy[seeded] += noise
    return noisy


def _apply_(
    op: Callable[[Tensor, Sequence[Row]], None], scores: Tensor, rows: Sequence[Row], chosen: list[int]
) -> None:
    """Run an in-place operation on the chosen rows only."""
    if len(chosen) == len(rows):
        op(scores, rows)
        return
    part = scores[chosen]
    op(part, [rows[index] for index in chosen])
    scores[chosen] = part


# Every operation below works in place on fp32 [R, V], all of whose rows asked for it.


def _logit_bias_(scores: Tensor, rows: Sequence[Row]) -> None:
    at = _cells(scores, [list(row.sampling.logit_bias) for row in rows])
    values = [bias for row in rows for bias in row.sampling.logit_bias.values()]
    scores[at] += torch.tensor(values, dtype=scores.dtype, device=scores.device)


def _repetition_penalty_(scores: Tensor, rows: Sequence[Row]) -> None:
    prompts: dict[int, set[int]] = {}  # the positions of one block share their prompt object
    tokens = []
    for row in rows:
        key = id(row.prompt_ids)
        if key not in prompts:
            prompts[key] = set(row.prompt_ids)
        tokens.append(list(prompts[key].union(row.output_ids)))
    at = _cells(scores, tokens)
    penalties = _column(scores, [row.sampling.repetition_penalty for row in rows])[at[0]].squeeze(1)
    values = scores[at]
    scores[at] = torch.where(values > 0, values / penalties, values * penalties)


def _presence_and_frequency_(scores: Tensor, rows: Sequence[Row]) -> None:
    counts = [Counter(row.output_ids) for row in rows]
    at = _cells(scores, [list(count) for count in counts])
    penalties = [
        row.sampling.presence_penalty + row.sampling.frequency_penalty * n
        for row, count in zip(rows, counts, strict=True)
        for n in count.values()
    ]
    scores[at] -= torch.tensor(penalties, dtype=scores.dtype, device=scores.device)


def _min_tokens_(scores: Tensor, rows: Sequence[Row]) -> None:
    scores[_cells(scores, [row.masked_until_min_tokens for row in rows])] = -math.inf


def _temperature_(scores: Tensor, rows: Sequence[Row]) -> None:
    # The maximum goes first: a tiny temperature then yields 0 and -inf, never inf - inf.
    scores -= scores.amax(dim=-1, keepdim=True)
    scores /= _column(scores, [smallest_temperature(row) for row in rows])


def _top_k_(scores: Tensor, rows: Sequence[Row]) -> None:
    wanted = torch.tensor([[row.sampling.top_k] for row in rows], dtype=torch.float64, device=scores.device)
    _keep_leading_(scores, torch.ones_like(scores), lambda _total: wanted)


def _top_p_(scores: Tensor, rows: Sequence[Row]) -> None:
    keep_top_p_(scores, [row.sampling.top_p for row in rows])


def _min_p_(scores: Tensor, rows: Sequence[Row]) -> None:
    floors = scores.amax(dim=-1, keepdim=True) + _column(scores, [math.log(r.sampling.min_p) for r in rows])
    scores.masked_fill_(scores < floors, -math.inf)


def _keep_leading_(scores: Tensor, measure: Tensor, wanted_of: Callable[[Tensor], Tensor]) -> None:
    """Keep the fewest tokens, by falling score and then rising id, whose measure adds up to what is wanted.

    The measure is 1 per token for top_k and the probability for top_p. No sort of the vocabulary: tokens fall
    into bins of equal score width, whole bins are kept or dropped, and only the one bin in which the sum reaches
    its goal is sorted. At V = 49k that is over ten times quicker than sorting, for flat distributions too.

    Args:
        scores: fp32 [R, V].
        measure: fp32 [R, V], not negative.
        wanted_of: maps the rows' totals, float64 [R, 1], to the sums wanted, float64 [R, 1].
    """
    depth = scores.amax(dim=-1, keepdim=True) - scores
    bins = depth.mul_(_BINS / _BINNED_NATS).clamp_(max=_BINS - 1).long()
    mass = torch.zeros(len(scores), _BINS, dtype=torch.float64, device=scores.device)
    mass = mass.scatter_add_(1, bins, measure.double()).cumsum_(dim=1)
    wanted = wanted_of(mass[:, -1:])
    # Rounding may leave even the whole vocabulary short of the goal: the last bin then is the one.
    last = torch.searchsorted(mass, wanted).clamp_(max=_BINS - 1)
    before = mass.gather(1, (last - 1).clamp_(min=0)).masked_fill_(last == 0, 0)
    row_ids, token_ids = (bins == last).nonzero(as_tuple=True)
    at = row_ids, token_ids
    dropped = _surplus(at, scores[at], measure[at], wanted - before)
    scores.masked_fill_(bins > last, -math.inf)
    scores[row_ids[dropped], token_ids[dropped]] = -math.inf


def _surplus(at: tuple[Tensor, Tensor], scores: Tensor, measure: Tensor, wanted: Tensor) -> Tensor:
    """Which of the listed tokens (bool [n]) come after the sum of their row has reached ``wanted`` [R, 1].

    Args:
        at: row and token id of each, int64 [n], rows together and ids rising.
        scores: fp32 [n].
        measure: fp32 [n].
        wanted: float64 [R, 1].
    """
    counts = at[0].bincount(minlength=len(wanted))
    slots = torch.arange(len(at[0]), device=scores.device) - (counts.cumsum(0) - counts)[at[0]]
    # One padded line per row rather than one running sum over all: rounding must not carry from row to row.
    shape = (len(wanted), int(counts.max()))
    order = (
        scores.new_full(shape, -math.inf)
        .index_put_((at[0], slots), scores)
        .sort(dim=1, descending=True, stable=True)
        .indices
    )
    padded = wanted.new_zeros(shape).index_put_((at[0], slots), measure.double())
    reached = padded.gather(1, order).cumsum_(dim=1) >= wanted
    late = pad(reached[:, :-1], (1, 0))  # the token that reaches the goal is still kept
    return torch.zeros_like(late).scatter_(1, order, late)[at[0], slots]


def _cells(scores: Tensor, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Row and column indices of the given tokens of each row."""
    sizes = torch.tensor([len(ids) for ids in tokens], device=scores.device)
    flat = torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64, device=scores.device)
    return torch.arange(len(tokens), device=scores.device).repeat_interleave(sizes), flat


def _column(scores: Tensor, values: Sequence[float]) -> Tensor:
    """[R, 1] of the scores' dtype."""
    return torch.tensor(values, dtype=scores.dtype, device=scores.device).unsqueeze(1)


def _warped(wanted: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: not is_greedy(row) and wanted(row)


#: The order of the HTTP contract: which rows need an operation, and the operation. Grammar masks will stand
#: between min_tokens and temperature.
_OPERATIONS: tuple[tuple[Callable[[Row], bool], Callable[[Tensor, Sequence[Row]], None]], ...] = (
    (lambda row: bool(row.sampling.logit_bias), _logit_bias_),
    (lambda row: row.sampling.repetition_penalty != 1, _repetition_penalty_),
    (
        lambda row: row.sampling.presence_penalty != 0 or row.sampling.frequency_penalty != 0,
        _presence_and_frequency_,
    ),
    (lambda row: len(row.output_ids) < row.sampling.min_tokens, _min_tokens_),
    (_warped(lambda row: row.sampling.temperature != 1), _temperature_),
    (_warped(lambda row: row.sampling.top_k > 0), _top_k_),
    (_warped(lambda row: row.sampling.top_p < 1), _top_p_),
    (_warped(lambda row: row.sampling.min_p > 0), _min_p_),
)
