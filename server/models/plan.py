"""Checkpoint tensors -> a packed plan for the CPU executor.

Mirrors ``llama.Decoder``: the same fetches, the same fusions (q, k, v; gate, up), but packed instead of torch modules.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paceline.kernels.cpu.int8 import pack_rows, quantize_rows
from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.plan import DecoderPlan, LayerPlan
from paceline.kernels.cpu.sparse import pack_sparse
from paceline.kernels.formats import Format, PackedLinear, SparseWeight, interleave_rows
from paceline.server.models.config import EMBEDDING, FC, FINAL_NORM, HEAD, ModelConfig
from paceline.server.models.native_form import Int8Rows

#: Fetches a checkpoint tensor by its Hugging Face name as fp32 on CPU.
Fetch = Callable[[str], Tensor]
#: Fetches one that the checkpoint stores in int8 as it is; None for all others.
FetchInt8 = Callable[[str], Int8Rows | None]
#: Fetches a linear that the checkpoint stores sparse; None for all others.
FetchSparse = Callable[[str], SparseWeight | None]
#: Makes one matrix (or one vector) of several with the same inputs.
Join = Callable[[Sequence[Tensor]], Tensor]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _alternate(parts: Sequence[Tensor]) -> Tensor:
    return interleave_rows(*parts)


class PlanBuilder:
    """Builds the plan of one decoder.

    Args:
        config: shapes.
        fetch: checkpoint tensors, fp32.
        pool: packs.
        format: of the linears; embeddings stay in bf16 unless it is fp32.
        stored_int8: what is stored in int8 goes into an int8 plan value by value, not rounded again.
        stored_sparse: what is stored sparse stays sparse, but in an fp32 plan: fp32 is what others are compared with,
            not what is fast.
    """

    def __init__(
        self,
        config: ModelConfig,
        fetch: Fetch,
        pool: Pool,
        format: Format,
        *,
        stored_int8: FetchInt8 = lambda name: None,
        stored_sparse: FetchSparse = lambda name: None,
    ) -> None:
        self._config, self._fetch, self._pool, self._format = config, fetch, pool, format
        self._stored_int8, self._stored_sparse = stored_int8, stored_sparse

    def build(self) -> DecoderPlan:
        """Fetch and pack everything."""
        c = self._config
        embedding = self._fetch(EMBEDDING)
        return DecoderPlan(
            hidden=c.hidden_size,
            ffn=c.intermediate_size,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            vocab=c.vocab_size,
            eps=c.rms_eps,
            rope_scale=c.rope_attention_scale,
            inv_freq=torch.tensor(c.rope_inv_freq),
            layers=tuple(self._layer(i) for i in range(c.num_layers)),
            final_norm=None if c.reads_state else self._norm(FINAL_NORM),
            fc=self._fused([FC.removesuffix(".weight")], bias=False) if c.reads_state else None,
            head=self._head(embedding),
            embedding=(embedding if self._format == "fp32" else embedding.bfloat16()).contiguous(),
        )

    def _layer(self, index: int) -> LayerPlan:
        c, name = self._config, f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        return LayerPlan(
            attention_norm=None
            if c.reads_state and index == 0
            else self._norm(f"{name}.input_layernorm.weight"),
            mlp_norm=self._norm(f"{name}.post_attention_layernorm.weight"),
            qkv=self._fused([f"{attention}.{p}_proj" for p in "qkv"], c.qkv_bias),
            output=self._fused([f"{attention}.o_proj"], c.output_bias),
            gate_up=self._gate_up(mlp),
            down=self._fused([f"{mlp}.down_proj"], c.mlp_bias),
            q_norm=self._norm(f"{attention}.q_norm.weight") if c.qk_norm else None,
            k_norm=self._norm(f"{attention}.k_norm.weight") if c.qk_norm else None,
            window=c.sliding_windows[index],
        )

    def _norm(self, name: str) -> Tensor:
        return self._fetch(name).contiguous()

    def _head(self, embedding: Tensor) -> PackedLinear:
        tied = self._config.tied_head
        kept = self._kept([EMBEDDING if tied else HEAD], _stack, None)
        return kept or self._pool.pack(embedding if tied else self._fetch(HEAD), self._format)

    def _fused(self, names: Sequence[str], bias: bool, join: Join = _stack) -> PackedLinear:
        weights = [f"{name}.weight" for name in names]
        biases = join([self._fetch(f"{name}.bias") for name in names]) if bias else None
        kept = self._sparse(weights, join, biases) or self._kept(weights, join, biases)
        return kept or self._pool.pack(join([self._fetch(name) for name in weights]), self._format, biases)

    def _gate_up(self, mlp: str) -> PackedLinear:
        return self._fused([f"{mlp}.{p}_proj" for p in ("gate", "up")], self._config.mlp_bias, _alternate)

    def _kept(self, names: Sequence[str], join: Join, bias: Tensor | None) -> PackedLinear | None:
        """The weights as they are stored, if the plan is in int8 and all of them are too."""
        parts = [self._stored_int8(name) for name in names] if self._format == "int8" else []
        rows = [part for part in parts if part is not None]
        if len(rows) < len(names):
            return None
        return pack_rows(join([r.values for r in rows]), join([r.scale for r in rows]), bias)

    def _sparse(self, names: Sequence[str], join: Join, bias: Tensor | None) -> PackedLinear | None:
        """The weights packed sparse, if any of them is stored so; what is dense among them keeps everything."""
        stored = [None if self._format == "fp32" else self._stored_sparse(name) for name in names]
        if all(weight is None for weight in stored):
            return None
        parts = [self._masked(name, weight) for name, weight in zip(names, stored, strict=True)]
        values, kept = (join([part[i] for part in parts]) for i in (0, 1))
        scales = [scale for _, _, scale in parts if scale is not None]
        return pack_sparse(values, kept, self._format, join(scales) if scales else None, bias)

    def _masked(self, name: str, weight: SparseWeight | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [out, in] in the plan's format, what is kept of them, and the scales of int8."""
        values, scale = self._values(name, weight)
        kept = torch.ones(values.shape, dtype=torch.bool) if weight is None else weight.kept()
        return values, kept, scale

    def _values(self, name: str, weight: SparseWeight | None) -> tuple[Tensor, Tensor | None]:
        if self._format != "int8":
            return self._fetch(name) if weight is None else weight.to_dense(), None
        if weight is None:
            rows = self._stored_int8(name)
            return quantize_rows(self._fetch(name)) if rows is None else (rows.values, rows.scale)
        return quantize_rows(weight.stored()) if weight.scale is None else (weight.stored(), weight.scale)
