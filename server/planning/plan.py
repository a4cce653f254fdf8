"""A whole plan: what was asked for, and everything that follows from it, as one tree of dataclasses.

Pure arithmetic over a ``Machine`` and footprints; the command makes those of names and files.
"""

import math
from dataclasses import dataclass

from paceline.server.errors import ConfigError
from paceline.server.planning.footprint import Footprint
from paceline.server.planning.roofline import Machine, binding_batch, kv_shards, prefill_seconds
from paceline.server.planning.speculation import Draft, Step, best_step, pays_up_to, step
from paceline.server.planning.traffic import Fleet, Goals, Replica, Requests, fleet

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Ask:
    """What is planned for.

    Attributes:
        context_tokens: longest sequence that is allowed.
        max_running: most sequences at once; None is as many as fit.
        chunk_tokens: of a prompt, per step.
        utilization: of a replica, at most.
    """

    requests: Requests
    context_tokens: int
    goals: Goals
    max_running: int | None
    chunk_tokens: int
    utilization: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one replica, all its devices together.

    Attributes:
        kv_per_token: of target and draft.
        kv_total: what is left for the cache.
        sequences: that fit at their mean length while they decode, and ``full_contexts`` at the longest.
    """

    total: float
    weights: int
    draft: int
    kv_per_token: float
    kv_total: float
    sequences: int
    full_contexts: int


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size: without a draft, and with the best draft length."""

    sequences: int
    plain: Step
    best: Step

    @property
    def speedup(self) -> float:
        """Of speculation; 1 where it does not pay."""
        return self.best.tokens_per_second / self.plain.tokens_per_second


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that follows.

    Attributes:
        limit: most sequences at once: what fits, at most ``max_running``.
        binding: sequences from which on decoding is bound by computing.
        prefill: seconds of one prompt, the draft's part included.
        pays_up_to: largest batch that drafts; None where none does, or there is no draft.
        fleet: replicas and their load, or why there is no number of them; None where no load was given.
    """

    ask: Ask
    machine: Machine
    target: Footprint
    draft: Draft | None
    memory: Memory
    limit: int
    binding: float
    prefill: float
    rows: tuple[Row, ...]
    pays_up_to: int | None
    most_qps: float
    fleet: Fleet | str | None


def make_plan(machine: Machine, target: Footprint, draft: Draft | None, ask: Ask) -> Plan:
    """Work it out.

    Raises:
        ConfigError: the request is longer than the context, the model cannot be divided, or it does not fit.
    """
    check(machine, target, ask)
    memory = count_memory(machine, target, draft, ask)
    limit = memory.sequences if ask.max_running is None else min(memory.sequences, ask.max_running)
    context = mean_context(ask.requests)
    pays = None if draft is None else pays_up_to(machine, target, context, draft, limit)
    prefill = prefill_seconds(machine, target, ask.requests.prompt_tokens, ask.chunk_tokens)
    if pays is not None and draft is not None and draft.model is not None:
        prefill += prefill_seconds(machine, draft.model, ask.requests.prompt_tokens, ask.chunk_tokens)
    replica = Replica(lambda n: best_step(machine, target, n, context, draft), limit, prefill)
    wanted = ask.requests.qps > 0
    return Plan(
        ask=ask,
        machine=machine,
        target=target,
        draft=draft,
        memory=memory,
        limit=limit,
        binding=binding_batch(machine, target),
        prefill=prefill,
        rows=tuple(
            Row(n, step(machine, target, n, context), best_step(machine, target, n, context, draft))
            for n in batch_sizes(limit)
        ),
        pays_up_to=pays,
        most_qps=replica.most_qps(ask.requests),
        fleet=fleet(replica, ask.requests, ask.goals, ask.utilization) if wanted else None,
    )


def mean_context(requests: Requests) -> float:
    """Tokens before a row that is decoded, on average over a request."""
    return requests.prompt_tokens + requests.output_tokens / 2


def batch_sizes(limit: int) -> list[int]:
    """1, 2, 4, ... and the limit."""
    return sorted({2**i for i in range(limit.bit_length()) if 2**i <= limit} | {limit})


def check(machine: Machine, target: Footprint, ask: Ask) -> None:
    """Refuse what no number of machines changes.

    Raises:
        ConfigError: see ``make_plan``.
    """
    config, requests = target.config, ask.requests
    longest = requests.prompt_tokens + requests.output_tokens
    if ask.context_tokens > config.context_length:
        raise ConfigError(
            f"--context-tokens: {ask.context_tokens} is over the model's {config.context_length} tokens"
        )
    if longest > ask.context_tokens:
        raise ConfigError(
            f"--prompt-tokens and --output-tokens are {longest} together, over the context of {ask.context_tokens}"
        )
    if config.num_heads % machine.devices:
        raise ConfigError(
            f"--tensor-parallel: {machine.devices} devices do not divide the model's {config.num_heads} attention heads"
        )


def count_memory(machine: Machine, target: Footprint, draft: Draft | None, ask: Ask) -> Memory:
    """What lies in a replica's memory and what is left for sequences.

    Raises:
        ConfigError: not even one sequence of the asked length fits.
    """
    total = machine.memory * machine.devices
    model = None if draft is None else draft.model
    drafting = (
        0 if model is None else model.resident_bytes * machine.devices
    )  # a draft is small: every device has it
    copies = machine.devices / kv_shards(machine, target)
    per_token = target.kv_bytes * copies + (0 if model is None else model.kv_bytes * machine.devices)
    left = total - target.resident_bytes - drafting
    requests = ask.requests
    each = mean_context(requests) * per_token
    longest = (requests.prompt_tokens + requests.output_tokens) * per_token
    if left < longest:
        raise _does_not_fit(total, target.resident_bytes + drafting, longest)
    return Memory(
        total=total,
        weights=target.resident_bytes,
        draft=drafting,
        kv_per_token=per_token,
        kv_total=left,
        sequences=max(1, math.floor(left / each)),
        full_contexts=math.floor(left / (ask.context_tokens * per_token)),
    )


def _does_not_fit(total: float, weights: float, sequence: float) -> ConfigError:
    return ConfigError(
        f"the model does not fit: weights take {weights / _GIB:.1f} GiB and one sequence {sequence / _GIB:.2f} GiB, "
        f"but {total / _GIB:.1f} GiB are usable; take more or larger devices (--gpus, --tensor-parallel), a smaller "
        "format (--weights, --sparsity) or shorter sequences"
    )
