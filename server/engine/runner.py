"""Runs one ragged batch of one member; the seam behind which executors differ (torch here).

A runner owns weights and KV views, and nothing about requests.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from paceline.kernels.cpu.drafting import Drafted, Draw
from paceline.server.decoding.rows import Row
from paceline.server.decoding.verify import DraftBlock, Rule
from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_blocks import MemberLayout
from paceline.server.models.attention import AttentionPlan, SequenceRows
from paceline.server.models.llama import Decoder, KvViews, RaggedInput


class Runner(Protocol):
    """What the engine needs of an executor.

    A model of a restricted vocabulary has logits of minus infinity for all other ids.
    """

    layout: MemberLayout
    vocab_size: int
    device: torch.device

    def forward(self, batch: Batch) -> Tensor:
        """Write the batch's K and V and return fp32 logits [len(batch.wanted), vocab_size]."""
        ...

    def argmax(self, logits: Tensor) -> list[int]:
        """Index of each row's greatest value, the lowest among equals: fp32 [rows, vocab]."""
        ...


@runtime_checkable
class JointRunner(Runner, Protocol):
    """A runner that can go forward with others in one call; small models then wait less for one another.

    ``shape``: those of equal shape can.
    """

    shape: Hashable

    @staticmethod
    def forward_together(runners: Sequence[Any], batches: Sequence[Batch]) -> list[Tensor]:
        """What each runner's ``forward`` would return for its batch."""
        ...


class StateReader(Protocol):
    """A target that keeps the states of what it ran, for a draft that reads them."""

    def read_states(self, spans: Sequence[SequenceRows]) -> Tensor:
        """States after the final norm, fp32 [rows, hidden], rows in the order of the spans.

        Args:
            spans: positions that were run; a start of -1 reads zeros before the first one.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeptStates:
    """The states before a batch's rows, which a draft reads as the batch's features.

    Attributes:
        spans: as for ``StateReader.read_states``, one per sequence of the batch.
    """

    target: StateReader
    spans: Sequence[SequenceRows]

    def read(self) -> Tensor:
        """fp32 [rows, hidden]."""
        return self.target.read_states(self.spans)


@runtime_checkable
class FeatureRunner(Protocol):
    """A draft that reads states: its batches carry features."""

    def forward_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits as ``forward``, and the states of the wanted rows, fp32 [wanted, hidden]."""
        ...


@runtime_checkable
class BlockDrafter(Protocol):
    """A runner that drafts whole blocks in one call.

    ``vocab_ids``: of a restricted vocabulary, the token id of each logit, ascending, int32 [k]; None is all ids.
    """

    vocab_ids: Tensor | None
    vocab_size: int

    def draft(
        self, batch: Batch, draws: Sequence[Draw], columns: int, kept: KeptStates | None = None
    ) -> list[Drafted]:
        """Run the batch, then one row per drafting sequence and forward.

        Args:
            batch: its wanted rows are the last ones of the drafting sequences.
            draws: the drafting sequences, in the order of ``batch.wanted``; blocks have room for all but the last
                draft token.
            columns: logits that may be drawn, the first ones.
            kept: the batch's features, for a draft that reads states.

        Returns:
            Draft tokens per drafting sequence.
        """
        ...


@runtime_checkable
class SampledVerifier(Protocol):
    """A runner that verifies and draws natively for unseeded sampled choices."""

    def verify_sampled(
        self,
        scores: Tensor,
        first_rows: Sequence[int],
        blocks: Sequence[DraftBlock],
        uniforms: Tensor,
        rule: Rule,
    ) -> Sequence[tuple[int, int]]:
        """See ``verify.NativeRule``."""
        ...


@runtime_checkable
class TokenChooser(Protocol):
    """A runner that chooses the tokens of greedy and seeded rows."""

    def choose_tokens(self, scores: Tensor, rows: Sequence[Row], *, warped: bool) -> list[int]:
        """The argmax of greedy rows, the argmax with Gumbel noise of seeded ones.

        Args:
            scores: fp32 [rows, V].
            warped: whether temperatures are in the scores already.
        """
        ...


class TorchRunner:
    """Torch modules over arena views: the oracle on CPU, the product path on CUDA."""

    def __init__(
        self, decoder: Decoder, layout: MemberLayout, kv: KvViews, kept: Tensor | None = None
    ) -> None:
        self.layout = layout
        self.vocab_size = decoder.config.vocab_size
        self._vocab_ids = decoder.vocab_ids
        self.device = decoder.embedding.device
        self._decoder = decoder
        self._kv = kv
        self._kept = kept

    def forward(self, batch: Batch) -> Tensor:
        """See ``Runner.forward``."""
        return self.forward_states(batch)[0]

    def forward_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``FeatureRunner.forward_states``."""
        plan = AttentionPlan(batch.sequences, self.layout.block_tokens, self.device)
        tokens = torch.tensor(batch.tokens, dtype=torch.long, device=self.device)
        wanted = torch.tensor(batch.wanted, dtype=torch.long, device=self.device)
        ragged = RaggedInput(tokens, plan, wanted, batch.features)
        logits, states = self._decoder.outputs(ragged, self._kv, self._kept)
        return spread(logits, self._vocab_ids, self.vocab_size), states

    def read_states(self, spans: Sequence[SequenceRows]) -> Tensor:
        """See ``StateReader.read_states``."""
        assert self._kept is not None
        size = self.layout.block_tokens
        positions = [s.start + i for s in spans for i in range(s.count)]
        pages = [s.pages[max(0, s.start + i) // size] for s in spans for i in range(s.count)]
        at = torch.tensor(positions, device=self.device)
        states = self._kept[torch.tensor(pages, device=self.device), at.clamp(min=0) % size].float()
        return states.where(at[:, None] >= 0, 0.0)

    def argmax(self, logits: Tensor) -> list[int]:
        """See ``Runner.argmax``."""
        return logits.argmax(dim=-1).tolist()  # torch promises the first of equal maxima


def forward_all(batches: Mapping[Runner, Batch]) -> dict[Runner, Tensor]:
    """The logits of several runners, each for its batch; those of one shape go together."""
    groups: dict[Any, list[Runner]] = {}
    for runner in batches:
        groups.setdefault(runner.shape if isinstance(runner, JointRunner) else runner, []).append(runner)
    said: dict[Runner, Tensor] = {}
    for runners in groups.values():
        first = runners[0]
        if isinstance(first, JointRunner) and len(runners) > 1:
            logits = first.forward_together(runners, [batches[runner] for runner in runners])
            said.update(zip(runners, logits, strict=True))
        else:
            said[first] = first.forward(batches[first])
    return said


def spread(logits: Tensor, vocab_ids: Tensor | None, vocab_size: int) -> Tensor:
    """Logits of a restricted vocabulary in their places among all ids.

    Args:
        logits: fp32 [rows, k].
        vocab_ids: token id of each column, int32 [k] on the same device; None returns ``logits`` as they are.

    Returns:
        fp32 [rows, vocab_size], minus infinity where there is no logit.
    """
    if vocab_ids is None:
        return logits
    return logits.new_full((len(logits), vocab_size), float("-inf")).index_copy_(1, vocab_ids.long(), logits)
