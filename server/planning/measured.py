"""This machine's rates for a model's shape and format, measured with the CPU kernels in a few seconds.

A decoder of random weights in the model's own layer shapes, as many layers of it as a fixed size allows, runs forwards
of 1 to 64 sequences, then one of longer contexts; ``fit`` makes the roofline's parameters of the times. The engine, its
Python and its drafts are not in them: see ``roofline.Overheads``.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from paceline.kernels.bench.ceiling import Reader
from paceline.kernels.bench.record import times_ms
from paceline.kernels.bench.shapes import BLOCK_TOKENS, KV_DTYPE, Shape, executor, random_plan
from paceline.kernels.bench.sparse_shapes import Pruned, prune
from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import KernelsMissing, Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import Format
from paceline.server.errors import ConfigError
from paceline.server.models.config import ModelConfig
from paceline.server.planning.roofline import MANY_ROWS, Machine, Overheads

#: Sequences of one row each that are timed; the last one's share of computing decides the operations per second.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHORT_CONTEXT, LONG_CONTEXT = 16, 512
#: (sequences, rows of each) with the long context: rows of one sequence share what they read of K and V, rows of
#: several do not. Several, as one row alone cannot keep all threads busy.
APART, TOGETHER = (4, 1), (1, MANY_ROWS)
#: Weights of the probe: more than most caches, yet packed and read in a second or two.
_MOST_BYTES = 192 << 20
_ROUNDS, _EACH = 5, 3
_TOKEN = 300
#: Exponents that are tried.
_EXPONENTS = tuple(1.0 + i / 8 for i in range(57))


#: Sequences, rows of each, tokens before them.
_Case = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured; bytes and operations per second, all threads together.

    Attributes:
        ceiling: memory read and nothing else.
        bandwidth: weights read by the linears.
        linear_flops, chunk_flops: computed by them in forwards of few rows, and of the many of a prompt.
        kv_bandwidth, attention_flops: K and V read, and attention computed with them.
        fit_error: greatest deviation of the fitted roofline from a timed forward, relative.
    """

    ceiling: float
    bandwidth: float
    linear_flops: float
    chunk_flops: float
    kv_bandwidth: float
    attention_flops: float
    overlap: float
    fit_error: float

    def machine(self, memory: float, overheads: Overheads) -> Machine:
        """One replica on this CPU."""
        return Machine(
            memory=memory,
            bandwidth=self.bandwidth,
            kv_bandwidth=self.kv_bandwidth,
            linear_flops=self.linear_flops,
            chunk_flops=self.chunk_flops,
            attention_flops=self.attention_flops,
            overlap=self.overlap,
            overheads=overheads,
        )


class Point(NamedTuple):
    """A timed forward: weight bytes, operations of its linears, seconds."""

    bytes: float
    flops: float
    seconds: float


class Fit(NamedTuple):
    """Parameters of ``roofline.linears_seconds``, and the greatest relative deviation from a point."""

    bandwidth: float
    flops: float
    overlap: float
    error: float


def measure(config: ModelConfig, format: Format, sparsity: float, threads: int) -> Rates:
    """Measure; takes a few seconds.

    Raises:
        ConfigError: the kernels were not built.
    """
    try:
        pool = Pool(threads)
    except (KernelsMissing, OSError) as error:
        raise ConfigError(
            f"this CPU cannot be measured: {error}; give --bandwidth-gbs and --tflops instead"
        ) from error
    plan = _probe(config, format, sparsity, pool)
    reader = Reader(pool, plan.bytes_per_forward)
    cases = [(n, 1, SHORT_CONTEXT) for n in BATCHES]
    cases += [(*rows, context) for rows in (APART, TOGETHER) for context in (SHORT_CONTEXT, LONG_CONTEXT)]
    model = executor(plan, pool, blocks=max(n * _blocks(rows, context) for n, rows, context in cases))
    times: dict[_Case, list[float]] = {case: [] for case in cases}
    for _ in range(_ROUNDS):
        reader.read(repeats=2)
        for case in cases:
            _run(model, *case)  # the caches hold what they hold when the same step is run again and again
            times[case] += times_ms(partial(_run, model, *case), _EACH)
    seconds = {case: statistics.median(values) / 1e3 for case, values in times.items()}
    return _rates(plan, reader.bytes_per_s, seconds)


def fit(points: Sequence[Point]) -> Fit:
    """The roofline nearest to timed forwards: per exponent the least squares of seconds^p, then the best exponent.

    Errors count relative to the time, so that small batches weigh as much as large ones.

    Args:
        points: at least three that differ in their operations.
    """
    return min((_fit_with(points, p) for p in _EXPONENTS), key=lambda one: one.error)


def _fit_with(points: Sequence[Point], p: float) -> Fit:
    """Non-negative a, b that minimise sum (a bytes^p + b flops^p - seconds^p)^2 / seconds^2p."""
    rows = [((q.bytes**p) / q.seconds**p, (q.flops**p) / q.seconds**p) for q in points]
    aa, bb = sum(x * x for x, _ in rows), sum(y * y for _, y in rows)
    ab, a1, b1 = sum(x * y for x, y in rows), sum(x for x, _ in rows), sum(y for _, y in rows)
    determinant = aa * bb - ab * ab
    a = (a1 * bb - b1 * ab) / determinant if determinant > 0 else 0.0
    b = (b1 * aa - a1 * ab) / determinant if determinant > 0 else 0.0
    if a <= 0.0:
        a, b = 1e-9 * a1 / aa, b1 / bb
    elif b <= 0.0:
        a, b = a1 / aa, 1e-9 * b1 / bb
    error = max(abs((a * x + b * y) ** (1 / p) - 1.0) for x, y in rows)
    return Fit(a ** (-1 / p), b ** (-1 / p), p, error)


def _probe(config: ModelConfig, format: Format, sparsity: float, pool: Pool) -> DecoderPlan:
    """A decoder of the model's layers, fewer of them where all would be too much, and of as much of its head."""
    shape = Shape(
        layers=1,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=1024,
        qkv_bias=config.qkv_bias,
    )
    layer = random_plan(shape, format, pool).layers[0]
    size = sum(linear.num_bytes for linear in (layer.qkv, layer.output, layer.gate_up, layer.down))
    layers = min(config.num_layers, max(1, _MOST_BYTES // size))
    vocab = max(1024, config.head_rows * layers // config.num_layers)
    plan = random_plan(
        Shape(
            layers,
            shape.hidden,
            shape.ffn,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            vocab,
            shape.qkv_bias,
        ),
        format,
        pool,
    )
    return prune(plan, Pruned(sparsity)) if sparsity and format != "fp32" else plan


def _blocks(rows: int, context: int) -> int:
    return -(-(rows + context) // BLOCK_TOKENS)


def _run(model: Executor, sequences: int, rows: int, context: int) -> None:
    """A forward; single rows want their logits, a prompt's rows the last one's."""
    each = _blocks(rows, context)
    spans = [(i * rows, rows, context, list(range(i * each, (i + 1) * each))) for i in range(sequences)]
    wanted = list(range(rows - 1, sequences * rows, rows))
    model.forward([_TOKEN] * (sequences * rows), spans, wanted)


def _rates(plan: DecoderPlan, ceiling: float, seconds: Mapping[_Case, float]) -> Rates:
    weights = 2 * sum(linear.out_features * linear.in_features for linear in plan.linears)
    size = plan.bytes_per_forward
    found = fit([Point(size, n * weights, seconds[n, 1, SHORT_CONTEXT]) for n in BATCHES])
    apart, together = (
        _per_token(seconds[*rows, LONG_CONTEXT] - seconds[*rows, SHORT_CONTEXT], rows)
        for rows in (APART, TOGETHER)
    )
    read, compute = split(apart, together, TOGETHER[1], found.overlap)
    kv_bytes = 2 * plan.kv_heads * plan.head_dim * len(plan.layers) * KV_DTYPE.itemsize
    flops = 4 * plan.heads * plan.head_dim * len(plan.layers)
    return Rates(
        ceiling=ceiling,
        bandwidth=found.bandwidth,
        linear_flops=found.flops,
        chunk_flops=_chunk_flops(plan, seconds[*TOGETHER, SHORT_CONTEXT], compute, found),
        kv_bandwidth=kv_bytes / read,
        attention_flops=flops / compute,
        overlap=found.overlap,
        fit_error=found.error,
    )


def _chunk_flops(plan: DecoderPlan, seconds: float, attending: float, fitted: Fit) -> float:
    """The linears' rate in a forward of many rows, of which only the last one's logits are wanted.

    Args:
        attending: seconds of attention per row and token.
    """
    rows = TOGETHER[1]
    linears = max(seconds - rows * (SHORT_CONTEXT + rows / 2) * attending, 0.5 * seconds)
    read, p = plan.bytes_per_forward / fitted.bandwidth, fitted.overlap
    computing = linears * max(1.0 - (read / linears) ** p, 0.5) ** (1 / p)
    head, *others = (one.out_features * one.in_features for one in (plan.head, *plan.linears[:-1]))
    return float(2 * (head + rows * sum(others)) / computing)


def split(apart: float, together: float, rows: int, p: float) -> tuple[float, float]:
    """What reading, and what computing with one token of context takes, of two times per row and token.

    A row alone takes p_norm(read, compute), one of ``rows`` that share what is read p_norm(read / rows, compute).

    Args:
        apart, together: seconds; where noise makes ``together`` the greater, reading counts as nothing.
    """
    top = max(apart, together)
    ratio = min(together / top, 1.0 - 1e-6)
    read = max((1.0 - ratio**p) / (1.0 - rows**-p), 1e-6)
    compute = max(1.0 - read, 1e-6) if apart >= together else 1.0
    return top * read ** (1 / p), top * compute ** (1 / p)


def _per_token(extra: float, rows: tuple[int, int]) -> float:
    """Seconds per row and token of context; noise may have made the difference negative."""
    return max(extra, 1e-6) / (rows[0] * rows[1] * (LONG_CONTEXT - SHORT_CONTEXT))
