"""What the target says about token sequences: its states, and how likely it finds the ids that a draft proposes.

One ragged prefill over many sequences at a time through the same runner that serves; rows go through the head in small
batches, so that full-vocabulary logits never take much memory. States come out of the KV cache, rounded as the drafts
that read them see them when served.

The teacher of a steered target says what it says when served: all members run over the sequence, each behind its own
prompt, and their logits are combined before anything is normalised. States are the target's alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from paceline.draftmodels.data.member_prompts import member_prompts
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.draftmodels.prefill import Piece, Prefill, Reading, batches_of, blocks_needed
from paceline.server.decoding import arithmetic
from paceline.server.decoding.mixture import BASE, Mixture, mixture
from paceline.server.engine.member_prompts import Prompts
from paceline.server.engine.steering_parts import SteeringParts
from paceline.server.errors import ConfigError, DataError
from paceline.server.models.loader import LoadedModel

#: Token rows per forward: enough for the kernels' full speed, and at most this many rows of logits at a time.
ROWS = 256
#: Log-probability of what cannot come out: its exp is 0, and a product with it is a number.
_LEAST = -1e4
#: Rows of logits that one thread normalises at a time; with a vocabulary of 49k they just fit its share of the caches.
_CHUNK_ROWS = 16


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """The target's view of one sequence.

    Attributes:
        states: after its final norm, one row per token, [tokens, hidden] in the type of the KV cache.
        log_p: log-probabilities of proposable ids, normalised over the full vocabulary, [answer tokens, k]; row j
            predicts the j-th token of the answer. Columns are the proposable ids, ascending, or those of ``ids``. What
            steering rules out has -10,000.
        ids: with top-k, which of the proposable ids the columns are: indices, most likely first, int32
            [answer tokens, k].
        log_rest: with top-k, log of the exact mass of all other proposable ids, fp32 [answer tokens].
    """

    states: Tensor
    log_p: Tensor
    ids: Tensor | None = None
    log_rest: Tensor | None = None


class Teacher:
    """The target of an engine as a teacher.

    Args:
        local: whose target; used on its threads.
        vocab_ids: ids that the draft proposes, ascending, int32 [k]; None is all.
        top_k: keep only that many log-probabilities per row; None keeps all.
        dtype: of ``log_p``: fp16 rounds log-probabilities by at most one part in 2,048.
    """

    def __init__(
        self,
        local: LocalEngine,
        vocab_ids: Tensor | None,
        *,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        proposable = local.config.vocab_size if vocab_ids is None else len(vocab_ids)
        if top_k is not None and not 1 <= top_k <= proposable:
            raise ConfigError(f"top_k must be between 1 and the draft's {proposable} ids, not {top_k}")
        self._local, self._top_k, self._dtype = local, top_k, dtype
        self._members = _members(local)
        self._vocab_ids = None if vocab_ids is None else vocab_ids.long().to(local.device)
        self._prefills: dict[int, Prefill] = {}

    def rows(
        self,
        sequences: Sequence[TokenSequence],
        temperature: float = 1.0,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[TeacherRows]:
        """Run the target over sequences.

        Args:
            sequences: each within the target's context.
            temperature: above 0; logits are divided by it.
            progress: told (done, total) sequences.

        Returns:
            One entry per sequence, in order, on the target's device.

        Raises:
            DataError: a sequence longer than the context of the target or of a member, or one whose prompt a member
                cannot be given.
            ConfigError: a temperature that is not above 0.
        """
        if not temperature > 0:
            raise ConfigError(f"a teacher's temperature must be above 0, not {temperature}")
        batches = list(batches_of(sequences, ROWS))
        readings = [self._reading(index, sequences, batches) for index in self._members]
        parts: list[list[_Columns]] = [[] for _ in sequences]
        rows: list[TeacherRows] = []
        with self._local.exclusive(), torch.no_grad(), self._normaliser(temperature) as columns:
            for pieces in batches:
                logits = [reading.forward(pieces) for reading in readings]
                counts = [piece.wanted(sequences[piece.index]) for piece in pieces]
                for piece, part in zip(pieces, columns(logits).split(counts), strict=True):
                    parts[piece.index].append(part)
                    if piece.stop == len(sequences[piece.index].tokens):
                        states = [reading.finish(piece.index) for reading in readings][BASE]
                        assert states is not None
                        rows.append(_joined(states, parts[piece.index]))
                        parts[piece.index] = []
                if progress is not None:
                    progress(len(rows), len(sequences))
        return rows

    def _reading(
        self, index: int, sequences: Sequence[TokenSequence], batches: Sequence[Sequence[Piece]]
    ) -> Reading:
        """A member over its sequences, with room for what is under way at a time; no blocks are in use."""
        member = self._members[index]
        own = [member.sequence(sequence) for sequence in sequences]
        longest = max((len(s.tokens) for s in own), default=1)
        if longest > member.model.config.context_length:
            raise DataError(
                f"a sequence of {longest} tokens does not fit {member.who}'s context of "
                f"{member.model.config.context_length}"
            )
        ahead = [len(a.tokens) - len(b.tokens) for a, b in zip(own, sequences, strict=True)]
        blocks = blocks_needed(batches, ahead)
        prefill = self._prefills.get(index)
        if prefill is None or prefill.num_blocks < blocks:
            prefill = self._prefills[index] = Prefill(
                self._local, member.model, blocks, keeps_states=index == BASE
            )
        prefill.reset()
        return Reading(prefill, own, ahead)

    @contextmanager
    def _normaliser(self, temperature: float) -> "Iterator[Callable[[Sequence[Tensor]], _Columns]]":
        """The members' logits to columns: chunk by chunk, on as many threads as the kernels have; CUDA and torch use
        their own."""

        def one(*members: Tensor) -> _Columns:
            logits = combined(members)
            return _columns(logits, temperature, self._vocab_ids, self._top_k, self._dtype)

        combined = _combination(self._local, list(self._members))
        pool = self._local.pool
        if pool is None:
            yield lambda members: one(*members)
            return
        with ThreadPoolExecutor(pool.threads) as threads:
            yield lambda members: _stacked(
                list(threads.map(one, *(torch.split(logits, _CHUNK_ROWS) for logits in members)))
            )


@dataclass(frozen=True, slots=True)
class _Member:
    """A model, and what it reads; ``who`` is what messages call it."""

    who: str
    model: LoadedModel
    prompt: Callable[[TokenSequence], Sequence[int]]

    def sequence(self, sequence: TokenSequence) -> TokenSequence:
        """The same answer behind the member's own prompt."""
        prompt = self.prompt(sequence)
        return TokenSequence((*prompt, *sequence.answer), len(prompt))


def _members(local: LocalEngine) -> dict[int, _Member]:
    """The target, and the members that run with it, by their indices."""
    found = {BASE: _Member("the target", local.target, _own_prompt)}
    mixed = None if local.steering is None else _mixture(local.steering)
    if local.steering is not None and mixed is not None:
        read = cache(partial(member_prompts, model=local.info))
        for index in mixed.members:
            member = local.steering.members[index - 1]
            found[index] = _Member(member.name, member.loaded, partial(_prompt_of, index, read))
    return found


def _mixture(steering: SteeringParts) -> Mixture | None:
    return mixture(steering.pairs, {}, len(steering.members) + 1)


def _own_prompt(sequence: TokenSequence) -> tuple[int, ...]:
    return sequence.tokens[: sequence.prompt_tokens]


def _prompt_of(
    index: int, read: Callable[[tuple[int, ...]], Prompts], sequence: TokenSequence
) -> tuple[int, ...]:
    own = _own_prompt(sequence)
    prompts = read(own)
    return prompts[index - 1] if prompts else own


def _combination(local: LocalEngine, indexes: Sequence[int]) -> Callable[[Sequence[Tensor]], Tensor]:
    """What makes one of the logits of the members that run, each fp32 [rows, the member's vocabulary]."""
    mixed = None if local.steering is None else _mixture(local.steering)
    if local.steering is None or mixed is None:
        return lambda members: members[0]
    vocab, count = local.config.vocab_size, len(local.steering.members) + 1

    def combined(said: Sequence[Tensor]) -> Tensor:
        width = min(logits.shape[1] for logits in said)
        members = [torch.zeros_like(said[0][:, :width])] * count
        for index, logits in zip(indexes, said, strict=True):
            members[index] = logits[:, :width]
        rows = len(said[0])
        weights = arithmetic.weight_rows([mixed], said[0].device).expand(rows, -1)
        result = arithmetic.combine(members, weights)
        arithmetic.restrict_(result, members, [mixed] * rows)
        return pad(result, (0, vocab - width), value=-math.inf)

    return combined


@dataclass(frozen=True, slots=True)
class _Columns:
    """``log_p``, ``ids`` and ``log_rest`` of ``TeacherRows`` for some rows."""

    log_p: Tensor
    ids: Tensor | None
    log_rest: Tensor | None

    def split(self, counts: Sequence[int]) -> "list[_Columns]":
        """Row by row parts of the given sizes."""
        log_p = torch.split(self.log_p, list(counts))
        if self.ids is None or self.log_rest is None:
            return [_Columns(part, None, None) for part in log_p]
        others = zip(log_p, *(torch.split(t, list(counts)) for t in (self.ids, self.log_rest)), strict=True)
        return [_Columns(*part) for part in others]


def _columns(
    logits: Tensor, temperature: float, vocab_ids: Tensor | None, top_k: int | None, dtype: torch.dtype
) -> _Columns:
    """Normalise rows over all of the vocabulary and keep what is asked for; see ``TeacherRows``."""
    scaled = logits if temperature == 1 else logits / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    own = scaled if vocab_ids is None else scaled.index_select(1, vocab_ids)
    log_p = own - total
    log_p.clamp_(min=_LEAST)
    if top_k is None:
        return _Columns(log_p.to(dtype), None, None)
    best = log_p.topk(top_k, dim=-1)
    rest = log_p.scatter(1, best.indices, -math.inf).logsumexp(-1).clamp_(min=_LEAST)
    return _Columns(best.values.to(dtype), best.indices.int(), rest)


def _stacked(parts: Sequence[_Columns]) -> _Columns:
    if len(parts) == 1:
        return parts[0]
    ids = [part.ids for part in parts if part.ids is not None]
    rests = [part.log_rest for part in parts if part.log_rest is not None]
    return _Columns(
        torch.cat([part.log_p for part in parts]),
        torch.cat(ids) if ids else None,
        torch.cat(rests) if rests else None,
    )


def _joined(states: Tensor, parts: Sequence[_Columns]) -> TeacherRows:
    columns = _stacked(parts)
    return TeacherRows(states, columns.log_p, columns.ids, columns.log_rest)
