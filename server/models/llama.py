"""One decoder for the Llama family: Llama, Mistral, Qwen2/2.5, Qwen3.

Runs a ragged batch of rows (prefill chunks, decodes and verify blocks alike) over a paged KV cache. Knows nothing of
requests or sampling. Projections that read the same input are fused: q, k, v and gate, up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.kernels.formats import SparseWeight
from paceline.server.models.attention import AttentionPlan
from paceline.server.models.config import FC, FINAL_NORM, ModelConfig
from paceline.server.models.layers import Linear, RMSNorm, Rotary, fuse, rotate
from paceline.server.models.sparse_linear import SparseLinear

#: Fetches a checkpoint tensor by its Hugging Face name, in the dtype and on the device to compute with.
Fetch = Callable[[str], Tensor]
#: Fetches a linear that the checkpoint stores sparse, so too; None for all others.
FetchSparse = Callable[[str], SparseWeight | None]
#: One layer's K and V views, each [pages, page_tokens, kv_heads, head_dim].
KvViews = list[tuple[Tensor, Tensor]]


class _Linears:
    """Makes the linears of blocks."""

    def __init__(self, fetch: Fetch, sparse: FetchSparse) -> None:
        self.fetch, self._sparse = fetch, sparse

    def __call__(self, names: Sequence[str], bias: bool) -> nn.Module:
        """One module for linears that read the same input; sparse if all of them are."""
        biases = [self.fetch(f"{name}.bias") if bias else None for name in names]
        stored = [self._sparse(f"{name}.weight") for name in names]
        sparse = [weight for weight in stored if weight is not None]
        if len(sparse) < len(names):
            return fuse([(self.fetch(f"{name}.weight"), b) for name, b in zip(names, biases, strict=True)])
        known = [b for b in biases if b is not None]
        return SparseLinear.from_weight(SparseWeight.stack(sparse), torch.cat(known) if known else None)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, optional biases and q/k norms."""

    def __init__(self, config: ModelConfig, layer: int, linears: _Linears) -> None:
        super().__init__()
        c, name, fetch = config, f"model.layers.{layer}.self_attn", linears.fetch
        self._heads, self._kv_heads, self._head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self._window = c.sliding_windows[layer]
        self.qkv = linears([f"{name}.{p}_proj" for p in "qkv"], c.qkv_bias)
        self.out = linears([f"{name}.o_proj"], c.output_bias)
        self.q_norm = RMSNorm(fetch(f"{name}.q_norm.weight"), c.rms_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(fetch(f"{name}.k_norm.weight"), c.rms_eps) if c.qk_norm else None

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], plan: AttentionPlan, kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; appends this batch's K and V to the cache."""
        heads = self.qkv(x).view(x.shape[0], -1, self._head_dim)
        qk, v = heads[:, : self._heads + self._kv_heads], heads[:, self._heads + self._kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : self._heads]), self.k_norm(qk[:, self._heads :])), dim=1)
        qk = rotate(qk, angles)
        attended = plan.attend(qk[:, : self._heads], qk[:, self._heads :], v, *kv, self._window)
        y: Tensor = self.out(attended)
        return y


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, layer: int, linears: _Linears) -> None:
        super().__init__()
        name, bias = f"model.layers.{layer}.mlp", config.mlp_bias
        self.gate_up = linears([f"{name}.{p}_proj" for p in ("gate", "up")], bias)
        self.down = linears([f"{name}.down_proj"], bias)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals; the first block of a draft that reads states has no norm before its
    attention."""

    def __init__(self, config: ModelConfig, layer: int, linears: _Linears) -> None:
        super().__init__()
        name, fetch = f"model.layers.{layer}", linears.fetch
        normed = layer > 0 or not config.reads_state
        self.attention_norm = (
            RMSNorm(fetch(f"{name}.input_layernorm.weight"), config.rms_eps) if normed else nn.Identity()
        )
        self.attention = Attention(config, layer, linears)
        self.mlp_norm = RMSNorm(fetch(f"{name}.post_attention_layernorm.weight"), config.rms_eps)
        self.mlp = MLP(config, layer, linears)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], plan: AttentionPlan, kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        x = x + self.attention(self.attention_norm(x), angles, plan, kv)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


@dataclass(frozen=True, slots=True)
class RaggedInput:
    """One forward: ``tokens`` int64 [rows], the attention plan of the same rows, the rows to put through the head,
    int64 [wanted], and for a draft that reads states the ``features``, fp32 [rows, hidden]."""

    tokens: Tensor
    plan: AttentionPlan
    wanted: Tensor
    features: Tensor | None = None


class Decoder(nn.Module):
    """The whole model.

    Args:
        config: shapes.
        fetch: called once per checkpoint tensor that is not sparse.
        stored_sparse: called for every linear of the blocks.
        vocab_ids: of a restricted vocabulary, the token id of each logit, ascending, int32 [head_rows].
    """

    def __init__(
        self,
        config: ModelConfig,
        fetch: Fetch,
        *,
        stored_sparse: FetchSparse = lambda name: None,
        vocab_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        linears = _Linears(fetch, stored_sparse)
        self.embedding = fetch("model.embed_tokens.weight")
        self.blocks = nn.ModuleList(Block(config, layer, linears) for layer in range(config.num_layers))
        self.fc = Linear(fetch(FC)) if config.reads_state else None
        self.norm = nn.Identity() if config.reads_state else RMSNorm(fetch(FINAL_NORM), config.rms_eps)
        self.head = Linear(self.embedding if config.tied_head else fetch("lm_head.weight"))
        self.rotary = Rotary(config, self.embedding.device)
        self.vocab_ids = None if vocab_ids is None else vocab_ids.to(self.embedding.device)

    @property
    def bytes_per_forward(self) -> int:
        """Weight bytes that a forward with logits reads."""
        return sum(part.num_bytes for part in self.modules() if isinstance(part, Linear | SparseLinear))

    def forward(self, ragged: RaggedInput, kv: KvViews, kept: Tensor | None = None) -> Tensor:
        """Run the batch and return fp32 logits [wanted, head_rows]; for ``kept`` see ``outputs``."""
        return self.outputs(ragged, kv, kept)[0]

    @torch.inference_mode()
    def outputs(self, ragged: RaggedInput, kv: KvViews, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the batch.

        Args:
            kept: pages that take every row's state, [pages, page_tokens, hidden].

        Returns:
            fp32 logits [wanted, head_rows], and the states that they were made of, fp32 [wanted, hidden].
        """
        x = self._inputs(ragged)
        angles = self.rotary.angles(ragged.plan.positions, x.dtype)
        for block, views in zip(self.blocks, kv, strict=True):
            x = block(x, angles, ragged.plan, views)
        if kept is not None:
            ragged.plan.write(kept, self.norm(x))
        states: Tensor = self.norm(x[ragged.wanted])
        return self.head(states).float(), states.float()

    def _inputs(self, ragged: RaggedInput) -> Tensor:
        x = F.embedding(ragged.tokens, self.embedding)
        if self.fc is None:
            return x
        assert ragged.features is not None
        joined: Tensor = self.fc(torch.cat((x, ragged.features.to(x.dtype)), dim=-1))
        return joined
