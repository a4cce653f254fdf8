"""Seconds of a forward on a machine, by the roofline: what must be read, what must be computed, the slower counts.

Linears and attention run one after another, so that each has a roof of its own. Where reading and computing overlap
only in part, the linears' two times are joined by a p-norm: p = infinity is the textbook's maximum, p = 1 their sum.
Tensor parallelism divides bytes, operations and KV by the number of devices and adds two all-reduces per layer.
"""

import math
from dataclasses import dataclass, replace

from paceline.server.planning.footprint import Footprint

_BF16_BYTES = 2
_ALL_REDUCES_PER_LAYER = 2
#: Rows up to which, and from which on, computing has a rate of its own: activations of many rows leave the near caches.
FEW_ROWS, MANY_ROWS = 64, 256


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds that the engine spends around forwards.

    Attributes:
        step: per engine step: scheduling, building the batch.
        sequence: per sequence of a step: its state, committing its tokens.
        row: per row whose logits are looked at: choosing.
        drafting: per step that drafts, with any number of draft forwards.
        drafted: per sequence and step that drafts.
    """

    step: float = 0.0
    sequence: float = 0.0
    row: float = 0.0
    drafting: float = 0.0
    drafted: float = 0.0

    def around(self, sequences: float, rows: float) -> float:
        """A step without what drafting adds."""
        return self.step + self.sequence * sequences + self.row * rows


@dataclass(frozen=True, slots=True)
class Machine:
    """What one replica runs on. All rates are those that are reached, efficiency included, of one device.

    Attributes:
        memory: bytes for weights and KV, of one device.
        bandwidth: weight bytes read per second.
        kv_bandwidth: K and V read per second, once per sequence however many rows it has; on CPUs far less, as bf16
            is widened on the way.
        linear_flops, attention_flops: operations per second.
        chunk_flops: the linears' in forwards of ``MANY_ROWS`` rows or more, where they differ from those of up to
            ``FEW_ROWS``; between them it is interpolated.
        overlap: exponent p of the p-norm, >= 1.
        devices: tensor-parallel degree.
        link: bytes per second between two devices, one direction; 0 where there is one device.
        all_reduce_seconds: what an all-reduce takes beside its bytes.
    """

    memory: float
    bandwidth: float
    kv_bandwidth: float
    linear_flops: float
    attention_flops: float
    chunk_flops: float | None = None
    overlap: float = math.inf
    devices: int = 1
    link: float = 0.0
    all_reduce_seconds: float = 0.0
    overheads: Overheads = Overheads()

    @property
    def alone(self) -> "Machine":
        """One of its devices."""
        return replace(self, devices=1)

    def linear_rate(self, rows: float) -> float:
        """Operations per second of the linears in a forward of so many rows."""
        if self.chunk_flops is None:
            return self.linear_flops
        share = math.log(max(rows, FEW_ROWS) / FEW_ROWS) / math.log(MANY_ROWS / FEW_ROWS)
        return float(self.linear_flops * (self.chunk_flops / self.linear_flops) ** min(share, 1.0))


@dataclass(frozen=True, slots=True)
class Work:
    """One forward.

    Attributes:
        rows: tokens that are computed.
        logit_rows: rows whose logits are wanted; 0 leaves the head out.
        sequences: whose KV is read.
        context: tokens that each sequence has before its rows, on average.
    """

    rows: float
    logit_rows: float
    sequences: float
    context: float


@dataclass(frozen=True, slots=True)
class Seconds:
    """The parts of a forward, one after another."""

    linears: float
    attention: float
    communication: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linears + self.attention + self.communication


def p_norm(a: float, b: float, p: float) -> float:
    """(a^p + b^p)^(1/p) of two numbers >= 0; their maximum for p = infinity."""
    high, low = max(a, b), min(a, b)
    return high if math.isinf(p) or high == 0.0 else high * (1.0 + (low / high) ** p) ** (1.0 / p)


def linears_seconds(machine: Machine, weight_bytes: float, flops: float, rows: float) -> float:
    """Reading weights once and computing with them, both divided over the devices."""
    read = weight_bytes / machine.bandwidth
    compute = flops / machine.linear_rate(rows)
    return p_norm(read, compute, machine.overlap) / machine.devices


def forward_seconds(machine: Machine, model: Footprint, work: Work) -> Seconds:
    """One forward of a model, without what the engine does around it."""
    head = model.head_bytes if work.logit_rows else 0
    flops = work.rows * model.block_flops + work.logit_rows * model.head_flops
    per_sequence = work.rows / work.sequences if work.sequences else 0.0
    attended = model.attended(
        work.context + (per_sequence + 1) / 2
    )  # a row sees itself and what its block has before
    read = (
        work.sequences * model.attended(work.context + per_sequence) * model.kv_bytes / machine.kv_bandwidth
    )
    compute = work.rows * attended * model.attention_flops / machine.attention_flops
    return Seconds(
        linears=linears_seconds(machine, model.block_bytes + head, flops, work.rows),
        attention=p_norm(read / kv_shards(machine, model), compute / machine.devices, machine.overlap),
        communication=all_reduce_seconds(machine, work.rows * model.config.hidden_size * _BF16_BYTES)
        * _ALL_REDUCES_PER_LAYER
        * model.config.num_layers,
    )


def decode_seconds(
    machine: Machine, model: Footprint, sequences: float, context: float, rows: int = 1
) -> float:
    """A forward that gives ``rows`` logits for each of so many sequences: 1 decodes, g + 1 verify a block of g."""
    count = sequences * rows
    return forward_seconds(machine, model, Work(count, count, sequences, context)).total


def prefill_seconds(machine: Machine, model: Footprint, tokens: int, chunk: int) -> float:
    """A prompt of so many tokens, in chunks, logits for its last token only."""
    total, done = 0.0, 0
    while done < tokens:
        rows = min(chunk, tokens - done)
        last = float(done + rows == tokens)
        total += forward_seconds(machine, model, Work(rows, last, 1.0, done)).total
        total += machine.overheads.around(1, last)
        done += rows
    return total


def all_reduce_seconds(machine: Machine, payload: float) -> float:
    """Summing ``payload`` bytes over the devices, around a ring: 2 (n - 1) / n of them over each link."""
    if machine.devices == 1:
        return 0.0
    share = 2 * (machine.devices - 1) / machine.devices
    return machine.all_reduce_seconds + share * payload / machine.link


def kv_shards(machine: Machine, model: Footprint) -> int:
    """Over how many devices the KV cache is divided: heads are not cut, so that more devices hold copies."""
    return min(machine.devices, model.config.num_kv_heads)


def binding_batch(machine: Machine, model: Footprint) -> float:
    """Rows from which on a forward's linears take longer to compute than their weights to be read."""
    return (model.bytes_per_forward / machine.bandwidth) * machine.linear_flops / model.flops_per_row
