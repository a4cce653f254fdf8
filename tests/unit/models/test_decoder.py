"""The decoder against transformers, for every family and for any way of cutting a batch into steps."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCHS, Arch, write_tiny_checkpoint
from transformers import AutoModelForCausalLM

from paceline.server.engine.batch import Batch
from paceline.server.engine.kv_arena import KvArena, MemberShape
from paceline.server.engine.kv_blocks import BlockTable, KvBlocks
from paceline.server.engine.runner import TorchRunner
from paceline.server.errors import ArtifactError, UnsupportedModelError
from paceline.server.models.config import parse_model_config
from paceline.server.models.llama import Decoder

SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
CASES: list[tuple[Arch, dict[str, Any]]] = [(arch, {}) for arch in ARCHS] + [
    ("llama", {"rope_scaling": SCALED["linear"]}),
    ("llama", {"rope_scaling": SCALED["llama3"]}),
    ("qwen2", {"rope_scaling": SCALED["yarn"]}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
]


def runner_for(folder: Path, *, num_blocks: int = 40, block_size: int = 4) -> tuple[TorchRunner, KvBlocks]:
    hf = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    config = parse_model_config(hf)
    member = MemberShape("m", config, torch.float32)
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    arena = KvArena(
        [member],
        block_size=block_size,
        total_bytes=num_blocks * block_size * per_token,
        device=torch.device("cpu"),
    )
    decoder = Decoder(config, lambda name: weights[name])
    return TorchRunner(decoder, arena.layout(member), arena.views(member)), KvBlocks(arena.num_blocks)


def oracle(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize(("arch", "overrides"), CASES)
def test_decoder_equals_transformers_in_one_chunk_and_token_by_token(arch, overrides, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "m", arch, **overrides)
    tokens = torch.randint(4, 300, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = oracle(folder, tokens)
    runner, blocks = runner_for(folder)
    for chunk in (70, 7, 1):
        table = BlockTable(runner.layout)
        assert blocks.grow([(table, len(tokens))])
        got = []
        for start in range(0, len(tokens), chunk):
            batch = Batch()
            part = tokens[start : start + chunk]
            batch.add(table, part, num_wanted=len(part))
            got.append(runner.forward(batch))
            table.num_computed += len(part)
        # fp32 sums in another order than eager attention's: 1e-3 on logits of magnitude 10.
        torch.testing.assert_close(torch.cat(got), expected, atol=1e-3, rtol=1e-3)
        blocks.release(table)
    assert expected.std() > 1


@pytest.mark.parametrize("seed", range(12))
def test_ragged_batches_equal_each_sequence_alone(seed, tiny_checkpoint):
    folder, rng = tiny_checkpoint("mistral"), random.Random(seed)
    runner, blocks = runner_for(folder, num_blocks=120)
    sequences = [[rng.randrange(4, 300) for _ in range(rng.randint(1, 60))] for _ in range(rng.randint(1, 5))]
    tables = [BlockTable(runner.layout) for _ in sequences]
    got: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(t.num_computed < len(s) for t, s in zip(tables, sequences, strict=True)):
        batch, spans = Batch(), []
        for i, (table, tokens) in enumerate(zip(tables, sequences, strict=True)):
            take = rng.randint(0, min(len(tokens) - table.num_computed, 25))
            if take:
                assert blocks.grow([(table, table.num_computed + take)])
                part = tokens[table.num_computed : table.num_computed + take]
                spans.append((i, batch.add(table, part, num_wanted=take)))
        if batch.tokens:
            logits = runner.forward(batch)
            for i, span in spans:
                got[i].append(logits[span])
                tables[i].num_computed += span.stop - span.start
    for tokens, parts in zip(sequences, got, strict=True):
        torch.testing.assert_close(torch.cat(parts), oracle(folder, tokens), atol=1e-3, rtol=1e-3)


def test_other_architectures_are_refused_with_the_list_and_the_hint():
    with pytest.raises(UnsupportedModelError, match=r"Llama 1-3.*--engine vllm"):
        parse_model_config({"model_type": "gemma2"})


def test_other_rope_scalings_are_refused(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "m", "llama")
    hf = json.loads((folder / "config.json").read_text())
    hf["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        parse_model_config(hf)


def test_contradicting_shapes_are_refused():
    with pytest.raises(ArtifactError, match="multiple"):
        parse_model_config(
            {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3, "hidden_size": 64}
        )
