"""Checkpoint tensors -> a packed plan for the CPU executor.

Mirrors ``llama.Decoder``: the same fetches, the same fusions (q, k, v; gate, up), but packed instead of torch modules.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from paceline.kernels.cpu.executor import DecoderPlan, LayerPlan
from paceline.kernels.cpu.library import Pool
from paceline.kernels.formats import Format, PackedLinear, interleave_rows
from paceline.server.models.config import ModelConfig

#: Fetches a checkpoint tensor by its Hugging Face name as fp32 on CPU.
Fetch = Callable[[str], Tensor]


class PlanBuilder:
    """Builds the plan of one decoder.

    Args:
        config: shapes.
        fetch: checkpoint tensors, fp32.
        pool: packs.
        format: of the linears; embeddings stay in bf16 unless it is fp32.
    """

    def __init__(self, config: ModelConfig, fetch: Fetch, pool: Pool, format: Format) -> None:
        self._config, self._fetch, self._pool, self._format = config, fetch, pool, format

    def build(self) -> DecoderPlan:
        """Fetch and pack everything."""
        c = self._config
        embedding = self._fetch("model.embed_tokens.weight")
        head = embedding if c.tied_head else self._fetch("lm_head.weight")
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
            final_norm=self._norm("model.norm.weight"),
            head=self._pool.pack(head, self._format),
            embedding=(embedding if self._format == "fp32" else embedding.bfloat16()).contiguous(),
        )

    def _layer(self, index: int) -> LayerPlan:
        c, name = self._config, f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        return LayerPlan(
            attention_norm=self._norm(f"{name}.input_layernorm.weight"),
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

    def _fused(self, names: list[str], bias: bool) -> PackedLinear:
        weight = torch.cat([self._fetch(f"{name}.weight") for name in names])
        biases = torch.cat([self._fetch(f"{name}.bias") for name in names]) if bias else None
        return self._pool.pack(weight, self._format, biases)

    def _gate_up(self, mlp: str) -> PackedLinear:
        parts = [self._fetch(f"{mlp}.{p}_proj.weight") for p in ("gate", "up")]
        bias = None
        if self._config.mlp_bias:
            bias = interleave_rows(*(self._fetch(f"{mlp}.{p}_proj.bias") for p in ("gate", "up")))
        return self._pool.pack(interleave_rows(*parts), self._format, bias)
