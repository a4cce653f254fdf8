"""Checkpoint tensors -> a packed plan for the CPU executor.

Mirrors ``llama.Decoder``: the same fetches, the same fusions (q, k, v; gate, up), but packed instead of torch modules.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paceline.kernels.cpu.executor import DecoderPlan, LayerPlan
from paceline.kernels.cpu.int8 import pack_rows
from paceline.kernels.cpu.library import Pool
from paceline.kernels.formats import Format, PackedLinear, interleave_rows
from paceline.server.models.config import EMBEDDING, FC, FINAL_NORM, HEAD, ModelConfig
from paceline.server.models.native_form import Int8Rows

#: Fetches a checkpoint tensor by its Hugging Face name as fp32 on CPU.
Fetch = Callable[[str], Tensor]
#: Fetches one that the checkpoint stores in int8 as it is; None for all others.
FetchInt8 = Callable[[str], Int8Rows | None]
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
    """

    def __init__(
        self,
        config: ModelConfig,
        fetch: Fetch,
        pool: Pool,
        format: Format,
        *,
        stored_int8: FetchInt8 = lambda name: None,
    ) -> None:
        self._config, self._fetch, self._pool, self._format = config, fetch, pool, format
        self._stored_int8 = stored_int8

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
        kept = self._kept(weights, join, biases)
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
