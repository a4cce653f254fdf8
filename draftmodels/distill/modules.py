"""Trainable drafts: independent ones, and those that read the target's last state, unrolled over several steps.

Parameters have the names of Hugging Face checkpoints (``Draft.checkpoint_tensors``). A forward takes a batch's layout
and gives, per unrolled step, the states that the head reads, [rows of the step, hidden]; logits are the objective's
business, as [rows, vocabulary] is what takes memory. Embedding and head may be frozen; frozen ones stay bf16.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.draftmodels.distill.blocks import Attend, Block, Positions, of_rows
from paceline.draftmodels.distill.layout import BatchLayout, Padded
from paceline.server.models.config import ModelConfig


class _Matrix(nn.Module):
    """``weight`` [rows, hidden], fp32 where it is trained and bf16 where it is frozen."""

    def __init__(self, rows: int, hidden: int, *, trained: bool) -> None:
        super().__init__()
        empty = torch.empty(rows, hidden, dtype=torch.float32 if trained else torch.bfloat16)
        self.weight = nn.Parameter(empty, requires_grad=trained)


class _Body(nn.Module):
    """What checkpoints call ``model``."""

    def __init__(self, embed_tokens: _Matrix, layers: Sequence[Block]) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)


class Draft(nn.Module, ABC):
    """A draft in training.

    Args:
        config: shapes; ``head_rows`` ids are proposed. A tied head is the embedding itself.
        steps: how many draft steps are unrolled.
        train_embedding, train_head: else frozen. With a tied head the two are one.
    """

    #: Whether forwards need the target's states.
    reads_state: bool = False

    def __init__(
        self, config: ModelConfig, *, steps: int = 1, train_embedding: bool = False, train_head: bool = False
    ) -> None:
        super().__init__()
        assert not (config.tied_head and train_embedding != train_head)
        self.config, self.steps = config, steps
        embedding = _Matrix(config.vocab_size, config.hidden_size, trained=train_embedding)
        self.model = _Body(embedding, self._layers(config))
        if not config.tied_head:
            self.lm_head = _Matrix(config.head_rows, config.hidden_size, trained=train_head)
        self._positions = Positions(config)

    @abstractmethod
    def _layers(self, config: ModelConfig) -> list[Block]: ...

    @abstractmethod
    def forward(self, layout: BatchLayout, states: Tensor | None = None) -> list[Tensor]:
        """States for the head, per step k = 1..steps fp32 [len(layout.step_rows(k)), hidden].

        Args:
            layout: the batch.
            states: of the target, after its final norm, fp32 [rows, hidden]; row i is the state BEFORE the row's
                token, that is after the token at position i - 1 (zeros at position 0).
        """

    @property
    def head(self) -> Tensor:
        """[head_rows, hidden]."""
        return self.model.embed_tokens.weight if self.config.tied_head else self.lm_head.weight

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by checkpoint name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every tensor by its checkpoint name, frozen ones too."""
        return dict(self.state_dict())

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.model.embed_tokens.weight).float()

    def _first_step(self, x: Tensor, layout: BatchLayout) -> tuple[Tensor, list["_Memory"]]:
        """All rows through all layers, in the last one only the answer rows; also what each layer's rows left."""
        angles = self._positions.angles(layout.positions)
        memories = []
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, Block)
            memory = _Memory()
            normed = layer.normed(x)
            memory.add(*layer.keys_values(normed, angles), layout.place)
            memories.append(memory)
            last, window = index == len(self.model.layers) - 1, self.config.sliding_windows[index]
            mask = layout.mask(1, answers=last, window=window)
            if last:
                x, normed = x[layout.answers], normed[layout.answers]
                angles = of_rows(angles, layout.answers)
            x = layer(x, normed, angles, memory.attend(layout.answer_place if last else layout.place, mask))
        return x, memories


class _Memory:
    """Keys and values that one layer's rows left, padded, one entry per step."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor, place: Padded) -> None:
        self._keys.append(place.spread(keys))
        self._values.append(place.spread(values))

    def attend(self, place: Padded, mask: Tensor) -> Attend:
        return Attend(place, tuple(self._keys), tuple(self._values), mask)


class IndependentDraft(Draft):
    """A small decoder of its own; with the target's text its steps are all alike, so one is trained."""

    def __init__(self, config: ModelConfig, *, train_embedding: bool, train_head: bool) -> None:
        super().__init__(config, steps=1, train_embedding=train_embedding, train_head=train_head)
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_eps)

    def _layers(self, config: ModelConfig) -> list[Block]:
        return [Block(config) for _ in range(config.num_layers)]

    def forward(self, layout: BatchLayout, states: Tensor | None = None) -> list[Tensor]:
        """See ``Draft.forward``; ``states`` are not looked at."""
        x, _ = self._first_step(self._embed(layout.tokens), layout)
        norm = self.model.norm
        assert isinstance(norm, nn.RMSNorm)
        return [norm(x).float()]


class FeatureDraft(Draft):
    """EAGLE-1's draft (2401.15077): fc([embedding of a token, state before it]), one or two blocks, no final norm.

    Step 1 reads the target's states, step k >= 2 its own output of the step before, as in serving: keys of drafted
    rows are those of the chain, keys of verified rows those made from the target's states. Unrolling is EAGLE-3's
    training-time test (2503.01840).
    """

    reads_state = True

    def __init__(self, config: ModelConfig, *, steps: int = 2, train_head: bool = False) -> None:
        super().__init__(config, steps=steps, train_head=train_head)
        self.model.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def _layers(self, config: ModelConfig) -> list[Block]:
        return [Block(config, input_norm=i > 0) for i in range(config.num_layers)]

    def forward(self, layout: BatchLayout, states: Tensor | None = None) -> list[Tensor]:
        """See ``Draft.forward``."""
        assert states is not None
        embedded = self._embed(layout.tokens)
        out, memories = self._first_step(self._combine(embedded, states), layout)
        outputs = [out]
        for step in range(2, self.steps + 1):
            before = outputs[-1][layout.continued(step)]
            outputs.append(self._chain_step(step, embedded, before, layout, memories))
        return [output.float() for output in outputs]

    def _combine(self, embedded: Tensor, states: Tensor) -> Tensor:
        fc = self.model.fc
        assert isinstance(fc, nn.Linear)
        # Back to fp32 where autocast made it bf16: this is what the residual stream starts from.
        y: Tensor = fc(torch.cat((embedded, states.float()), -1)).float()
        return y

    def _chain_step(
        self, step: int, embedded: Tensor, before: Tensor, layout: BatchLayout, memories: list[_Memory]
    ) -> Tensor:
        chosen = layout.step_rows(step)
        rows, place = layout.answers[chosen], layout.answer_place.only(chosen)
        angles = self._positions.angles(layout.positions[rows])
        x = self._combine(embedded[rows], before)
        for index, (layer, memory) in enumerate(zip(self.model.layers, memories, strict=True)):
            assert isinstance(layer, Block)
            normed = layer.normed(x)
            memory.add(*layer.keys_values(normed, angles), layout.answer_place.only(chosen))
            mask = layout.mask(step, answers=True, window=self.config.sliding_windows[index])
            x = layer(x, normed, angles, memory.attend(place, mask))
        return x
