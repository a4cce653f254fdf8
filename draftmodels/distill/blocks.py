"""Trainable decoder blocks of the Llama family, with the parameter names of Hugging Face checkpoints.

The arithmetic is that of ``server.models.llama``, without a cache: keys and values are handed to the attention, which
is told by a mask who sees whom (``layout``). Rows are packed, [rows, features].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.draftmodels.distill.layout import Padded
from paceline.server.models.config import ModelConfig
from paceline.server.models.layers import Rotary, rotate

Angles = tuple[Tensor, Tensor]
#: Attention over keys and values that it already has: queries [rows, heads, head_dim] -> [rows, heads * head_dim].
Attention = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Attend:
    """One attention call: queries in ``place``; padded keys and values, [batch, keys, kv_heads, head_dim]; mask."""

    place: Padded
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    mask: Tensor

    def __call__(self, q: Tensor) -> Tensor:
        """[rows, heads, head_dim] -> [rows, heads * head_dim]."""
        repeats = q.shape[1] // self.keys[0].shape[2]
        k, v = (_heads_first(parts).repeat_interleave(repeats, 1) for parts in (self.keys, self.values))
        padded = self.place.spread(q).transpose(1, 2)
        out = F.scaled_dot_product_attention(padded, k, v, attn_mask=self.mask, is_causal=self.mask is None)
        return self.place.collect(out.transpose(1, 2)).flatten(1)


def _heads_first(parts: Sequence[Tensor]) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
    return whole.transpose(1, 2)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, optional biases and q/k norms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, self._head_dim = config, config.head_dim
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.output_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_eps) if c.qk_norm else None

    def keys_values(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """[rows, hidden] -> keys (fp32) and values, each [rows, kv_heads, head_dim]."""
        k = self._heads(self.k_proj(x)).float()
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(k, angles), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, angles: Angles, attend: Attention) -> Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        # fp32, as autocast may have made it bf16, in which positions of a few thousand do not rotate exactly.
        q = self._heads(self.q_proj(x)).float()
        q = q if self.q_norm is None else self.q_norm(q)
        y: Tensor = self.o_proj(attend(rotate(q, angles)))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1] // self._head_dim, self._head_dim)


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, bias = (config.hidden_size, config.intermediate_size), config.mlp_bias
        self.gate_proj = nn.Linear(*sizes, bias=bias)
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """Attention and MLP with residuals; ``input_norm`` False leaves the first norm out.

    Attention reads ``normed`` rows, which the caller makes once for ``keys_values`` and ``forward``.
    """

    def __init__(self, config: ModelConfig, *, input_norm: bool = True) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_eps) if input_norm else nn.Identity()
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = MLP(config)

    def normed(self, x: Tensor) -> Tensor:
        """What attention reads of rows [rows, hidden], in the type that matrices multiply."""
        return _narrow(self.input_layernorm(x))

    def keys_values(self, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """What later rows see of these rows."""
        return self.self_attn.keys_values(normed, angles)

    def forward(self, x: Tensor, normed: Tensor, angles: Angles, attend: Attention) -> Tensor:
        """Rows [rows, hidden], and what ``normed`` makes of them, -> [rows, hidden]."""
        x = x + self.self_attn(normed, angles, attend)
        y: Tensor = x + self.mlp(_narrow(self.post_attention_layernorm(x)))
        return y


def _narrow(x: Tensor) -> Tensor:
    """In autocast's type, if it is on: else every matrix that reads ``x`` would cast it again."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Positions:
    """Rotary angles of a batch's rows."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._rotary: dict[torch.device, Rotary] = {}

    def angles(self, positions: Tensor) -> Angles:
        """See ``Rotary.angles``; fp32."""
        device = positions.device
        if device not in self._rotary:
            self._rotary[device] = Rotary(self._config, device)
        return self._rotary[device].angles(positions, torch.float32)


def of_rows(angles: Angles, rows: Tensor) -> Angles:
    """The angles of some rows."""
    return angles[0][rows], angles[1][rows]
