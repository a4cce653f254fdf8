"""Bytes and operations from a configuration are those of what the engine really packs and keeps."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_drafts import write_feature_draft
from native_kernels import TINY_SHAPES, require_native
from tiny import tiny_hf_config

from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.sparse import pack_sparse
from paceline.kernels.formats import FORMATS, Format, packed_bytes
from paceline.server.engine.kv_arena import MemberShape
from paceline.server.models.config import ModelConfig, parse_model_config
from paceline.server.models.loader import ModelLoader
from paceline.server.planning.footprint import footprint
from paceline.server.planning.inputs import read_model

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def config(**overrides: Any) -> ModelConfig:
    return parse_model_config(tiny_hf_config("llama", **overrides))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "width"), [(16, 64), (37, 100), (300, 6), (1, 1)])
def test_a_dense_linear_takes_the_bytes_that_packing_gives_it(
    format: Format, bias: bool, out: int, width: int
) -> None:
    require_native()
    packed = Pool(1).pack(torch.randn(out, width), format, torch.randn(out) if bias else None)
    assert packed_bytes(out, width, format, bias=bias) == packed.num_bytes


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize(("out", "width", "kept"), [(16, 64, 0.5), (40, 130, 0.25), (33, 100, 0.1)])
def test_a_sparse_linear_takes_the_bytes_that_packing_gives_it(
    format: Format, out: int, width: int, kept: float
) -> None:
    count = round(kept * out * width)
    mask = torch.zeros(out * width, dtype=torch.bool)
    mask[torch.randperm(out * width)[:count]] = True
    packed = pack_sparse(torch.randn(out, width) * mask.view(out, width), mask.view(out, width), format)
    assert packed_bytes(out, width, format, kept=count / (out * width)) == packed.num_bytes


@pytest.mark.parametrize("shape", TINY_SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_model_reads_the_bytes_of_its_plan(
    shape: str, format: Format, tiny_checkpoint: Any, own_cache: Any
) -> None:
    require_native()
    arch, overrides = TINY_SHAPES[shape]
    folder = tiny_checkpoint(arch, **overrides)
    loaded = ModelLoader(torch.device("cpu"), Pool(1)).load(folder, format)
    counted = footprint(read_model(str(folder)).config, format)
    plan: Any = loaded.weights
    assert counted.bytes_per_forward == plan.bytes_per_forward
    embedding = plan.embedding.numel() * plan.embedding.element_size()
    assert counted.resident_bytes == plan.bytes_per_forward + embedding
    assert counted.kv_bytes == MemberShape("k", loaded.config, loaded.kv_dtype).bytes_per_token
    assert counted.flops_per_row == 2 * sum(one.out_features * one.in_features for one in plan.linears)


def test_a_draft_that_reads_states_counts_its_first_linear_and_its_own_head(
    tmp_path: Any, tiny_checkpoint: Any, own_cache: Any
) -> None:
    require_native()
    target = tiny_checkpoint("llama")
    folder = write_feature_draft(
        tmp_path / "draft", target, ids=range(0, 300, 3), shared=["model.embed_tokens.weight"]
    )
    loaded = ModelLoader(torch.device("cpu"), Pool(1)).load(folder, "int8", target=target)
    plan: Any = loaded.weights
    facts = read_model(str(folder))
    assert facts.config.head_rows == 100
    assert footprint(facts.config, "int8").bytes_per_forward == plan.bytes_per_forward
    states = footprint(config(), "int8", keeps_states=True).kv_bytes
    assert states == MemberShape("t", config(), torch.bfloat16, keeps_states=True).bytes_per_token


def test_smollm2_by_hand() -> None:
    """The figure that the bench of a decode step has on record, and a head of 49,152 x 576 beside 30 blocks."""
    counted = footprint(config(**SMOLLM2), "int8")
    assert counted.bytes_per_forward == 135_298_560
    assert counted.head_bytes == 49_152 * (576 + 4)
    assert counted.head_flops == 2 * 49_152 * 576
    assert counted.block_flops == 2 * 30 * 576 * (576 + 2 * 192 + 576 + 3 * 1536)
    assert counted.attention_flops == 4 * 30 * 576
    assert counted.kv_bytes == 2 * 2 * 30 * 192


def test_int4_by_hand() -> None:
    """64 x 64 weights, half a byte each, and 16 bits for the one group of every row; the head stays bf16."""
    counted = footprint(config(num_hidden_layers=1, num_key_value_heads=4, intermediate_size=64), "int4")
    linears = {(192, 64): 1, (64, 64): 2, (128, 64): 1}
    assert counted.block_bytes == sum(n * (out * width // 2 + 2 * out) for (out, width), n in linears.items())
    assert counted.head_bytes == 2 * 64 * counted.config.vocab_size + 2 * 64 * (
        -counted.config.vocab_size % 16
    )


def test_only_blocks_are_sparse_and_an_fp32_plan_is_dense() -> None:
    dense, sparse = (footprint(config(), "int8", sparsity=s) for s in (0.0, 0.75))
    assert sparse.head_bytes == dense.head_bytes
    assert sparse.block_bytes < 0.6 * dense.block_bytes
    assert footprint(config(), "fp32", sparsity=0.75) == footprint(config(), "fp32")


def test_what_is_shared_lies_in_memory_once() -> None:
    tied = config(tie_word_embeddings=True)
    twice, once = footprint(tied, "bf16"), footprint(tied, "bf16", shares_head=True)
    assert twice.resident_bytes - once.resident_bytes == 2 * tied.vocab_size * tied.hidden_size
    assert footprint(tied, "int8", shares_head=True) == footprint(tied, "int8")  # an int8 head is a copy
    untied = config()
    assert footprint(untied, "bf16", shares_head=True) == footprint(untied, "bf16")


@given(st.floats(0, 100_000))
def test_a_window_bounds_what_a_row_attends_to(context: float) -> None:
    sliding = dataclasses.replace(config(), sliding_windows=(16, None))
    assert footprint(sliding, "int8").attended(context) == pytest.approx((min(16, context) + context) / 2)
    assert footprint(config(), "int8").attended(context) == pytest.approx(context)
