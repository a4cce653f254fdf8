"""Whatever stands in a sparse artifact, loading it gives an error of one line or the weights that its bytes say.

Tiny sparse artifacts are damaged at random: the header of the weights file as JSON and as bytes, masks, offsets, scales
and values, whole tensors with their types and shapes, cut and lengthened files, ``config.json``, ``paceline.json``.
Each goes through checkpoint, plan and a forward of the CPU kernels, or through the torch modules. What loads is
compared with an independent reading of the file. ``make fuzz`` runs 20,000 cases, the ordinary suite a twentieth,
always the same; ``PACELINE_CAMPAIGN=full make sanitize`` runs all of them under AddressSanitizer and UBSan. A case is
reproduced by its number; after a crash the artifact is still in the test's folder.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact_damage import MANIFEST, WEIGHTS, Files, damaged
from campaign import FULL, size
from conftest import TinyCheckpoint
from native_kernels import BLOCK_TOKENS, pool, require_native, run_alone
from safetensors.torch import load
from sparse_students import write_tiny_student
from torch import Tensor

from paceline.kernels.cpu.library import best_isa
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import interleave_rows
from paceline.server.errors import UserError
from paceline.server.models.llama import Decoder
from paceline.server.models.loader import LoadedModel, ModelLoader

SHAPE: Mapping[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 40,
}
#: Name of each artifact: what it is made with.
FORMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "int8": ("llama", {"dtype": "int8", "int8_head": True, "sparsity": 0.6}),
    "tied": ("qwen2", {"dtype": "bf16", "sparsity": 0.5}),
    "2:4": ("llama", {"dtype": "fp16", "pattern": "2:4"}),
    "16:32": ("qwen3", {"dtype": "int8", "pattern": "16:32"}),
    "few ids": ("llama", {"dtype": "fp32", "kind": "draft", "ids": range(0, 40, 3)}),
}
TOKENS = [0, 5, 11, 3, 27]


@pytest.fixture(scope="module")
def artifacts(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("artifacts")
    made = []
    for name, (arch, form) in FORMS.items():
        parent = tiny_checkpoint(arch, **SHAPE)
        made.append(write_tiny_student(root / name.replace(":", "of"), parent, **form))
    return made


def read_independently(files: Files) -> dict[str, Tensor]:
    """Every linear as dense fp32, decoded bit by bit with numpy; small enough for that."""
    tensors = load(files[WEIGHTS])
    dense = {}
    for name in [key.removesuffix("_bitmask") for key in tensors if key.endswith(".weight_bitmask")]:
        values, scale = tensors[f"{name}_values"].float().flatten(), tensors.get(f"{name}_scale")
        bits = np.unpackbits(tensors[f"{name}_bitmask"].numpy(), axis=1, bitorder="little").astype(bool)
        whole = torch.zeros(bits.shape)
        whole[torch.from_numpy(bits)] = values
        dense[name] = whole if scale is None else whole * scale[:, None]
    return dense


def check_plan(plan: DecoderPlan, files: Files, weights: str) -> None:
    """Every packed linear of the blocks holds what the file says; float weights that int8 rounded only nearly."""
    dense = read_independently(files)
    if weights == "int8" and json.loads(files[MANIFEST])["weights"]["value_dtype"] != "int8":
        return
    for index, layer in enumerate(plan.layers):
        name = f"model.layers.{index}"
        q, k, v = (dense.get(f"{name}.self_attn.{part}_proj.weight") for part in "qkv")
        gate, up = (dense.get(f"{name}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        pairs = [
            (layer.qkv, None if q is None or k is None or v is None else torch.cat((q, k, v))),
            (layer.output, dense.get(f"{name}.self_attn.o_proj.weight")),
            (layer.gate_up, None if gate is None or up is None else interleave_rows(gate, up)),
            (layer.down, dense.get(f"{name}.mlp.down_proj.weight")),
        ]
        for packed, expected in pairs:
            if expected is None:
                continue
            expected = expected.bfloat16().float() if packed.format == "bf16" else expected
            torch.testing.assert_close(packed.unpack(), expected, rtol=0, atol=0, equal_nan=True)


def run_modules(model: LoadedModel) -> None:
    """The linears of the first block, as torch modules."""
    assert isinstance(model.weights, Decoder)
    block: Any = model.weights.blocks[0]
    x = torch.ones(2, model.config.hidden_size, dtype=model.kv_dtype)
    with torch.no_grad():
        assert block.mlp(x).shape == x.shape
        assert block.attention.qkv(x).shape == (2, block.attention.qkv.out_features)


def load_and_run(folder: Path, files: Files, rng: random.Random) -> None:
    """Through the whole loader and a forward."""
    if rng.random() < 0.15:
        run_modules(
            ModelLoader(torch.device("cpu")).load(folder, rng.choice(["fp32", "bf16"]), fleeting=True)
        )
        return
    weights: Any = rng.choice(["fp32", "bf16", "int8"])
    kernels = pool("portable" if rng.random() < 0.3 else best_isa(), 1)
    model = ModelLoader(torch.device("cpu"), kernels).load(folder, weights, fleeting=True)
    plan = model.weights
    assert isinstance(plan, DecoderPlan)
    check_plan(plan, files, weights)
    tokens = [token % plan.vocab for token in TOKENS]
    logits = run_alone(plan, kernels, model.kv_dtype, tokens, chunk=rng.choice([1, 5]))
    assert logits.shape == (len(tokens), plan.head.out_features)
    assert len(tokens) <= BLOCK_TOKENS


def outcome(folder: Path, files: Files, rng: random.Random) -> str:
    """What became of a case: "loaded", "refused", or what must not be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    try:
        load_and_run(folder, files, rng)
    except UserError as error:
        return "refused" if str(error).isprintable() else f"not one line: {str(error)!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_a_damaged_artifact_is_refused_or_loaded_as_it_is(
    artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_native()
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    outcomes: Counter[str] = Counter()
    start = random.SystemRandom().randrange(1 << 32) if FULL else 0
    for case in range(start, start + size(20_000)):
        artifact = artifacts[case % len(artifacts)]
        files, rng, damage = damaged(artifact, case)
        found = outcome(tmp_path / "artifact", files, rng)
        assert found in ("loaded", "refused"), f"case {case}, {damage} of {artifact.name}: {found}"
        outcomes[found] += 1
    assert outcomes["refused"] > size(20_000) // 2, outcomes
    assert outcomes["loaded"] > size(20_000) // 20, outcomes
