"""Drafts that read states, computed whole by transformers: every block from the first token on, without any cache."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from native_drafts import EMBEDDING, HEAD
from native_kernels import pool
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from paceline.kernels import reference
from paceline.kernels.formats import Format
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import FC
from paceline.server.models.native_form import NativeCheckpoint


class _Int8(nn.Module):
    """An ``nn.Linear`` as the int8 kernels compute it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._layer = pool("portable").pack(linear.weight, "int8", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear(x.reshape(-1, x.shape[-1]), self._layer).view(*x.shape[:-1], -1)


@cache
def _model(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def target_states(target: Path, tokens: Sequence[int]) -> Tensor:
    """The target's states after its final norm, fp32 [tokens, hidden]."""
    with torch.inference_mode():
        states: Tensor = _model(target)(torch.tensor([list(tokens)])).last_hidden_state[0]
    return states


class FeatureOracle:
    """One draft of one target; ``format`` is what its weights and activations are rounded to."""

    def __init__(self, folder: Path, target: Path, format: Format = "fp32") -> None:
        checkpoint = NativeCheckpoint(folder, open_checkpoint(target))
        tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.tensor_names()}
        if format == "bf16":
            tensors = {
                n: t if "norm" in n or "bias" in n else t.bfloat16().float() for n, t in tensors.items()
            }
        self._embedding = tensors[EMBEDDING] if format == "fp32" else tensors[EMBEDDING].bfloat16().float()
        self._fc, self._head = _linear(tensors[FC], format), _linear(tensors[HEAD], format)
        self._ids = checkpoint.draft_vocab
        self._blocks = AutoModel.from_config(
            AutoConfig.for_model(**checkpoint.hf_config), attn_implementation="eager", dtype=torch.float32
        ).eval()
        names = {n.removeprefix("model."): t for n, t in tensors.items() if ".layers." in n}
        self._blocks.load_state_dict(names, strict=False)
        self._blocks.layers[0].input_layernorm = self._blocks.norm = nn.Identity()
        if format == "int8":
            for name, module in list(self._blocks.named_modules()):
                if isinstance(module, nn.Linear):
                    self._blocks.set_submodule(name, _Int8(module))

    def replace_fc(self, weight: Tensor) -> None:
        """Join embeddings and states with another fp32 [hidden, 2 * hidden]."""
        self._fc = _linear(weight, "fp32")

    @torch.inference_mode()
    def rows(self, tokens: Sequence[int], features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and states of every row: fp32 [tokens, k], [tokens, hidden]; ``features`` fp32 [tokens, hidden]."""
        x = self._fc(torch.cat((F.embedding(torch.tensor(list(tokens)), self._embedding), features), dim=1))
        states = self._blocks(inputs_embeds=x[None]).last_hidden_state[0]
        return self._head(states), states

    def block(self, tokens: Sequence[int], states: Tensor, length: int) -> list[int]:
        """The greedy block behind ``tokens``; ``states`` are the target's of all of them but the last."""
        features = torch.cat((torch.zeros(1, states.shape[1]), states))
        text, drafted = list(tokens), []
        for _ in range(length):
            logits, own = self.rows(text, features)
            best = int(logits[-1].argmax())
            drafted.append(best if self._ids is None else int(self._ids[best]))
            text.append(drafted[-1])
            features = torch.cat((features, own[-1:]))
        return drafted


def _linear(weight: Tensor, format: Format) -> Callable[[Tensor], Tensor]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return _Int8(linear) if format == "int8" else linear
