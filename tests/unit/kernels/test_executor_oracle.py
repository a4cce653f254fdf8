"""The executor against transformers: every architecture and awkward shapes, per format and instruction set.

The oracle computes what the format stores: weights rounded to bf16, or linears replaced by ``reference.linear`` for
int8. What is left between the two is the order of sums.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_kernels import TINY_SHAPES, executor, load_plan, pool, require_native, run_alone
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from paceline.kernels import reference
from paceline.kernels.cpu.executor import Executor
from paceline.kernels.formats import FORMATS, Format

TOKENS = torch.randint(4, 300, (70,), generator=torch.Generator().manual_seed(1)).tolist()
#: Largest difference of two logits (their standard deviation is 2.5). The order of fp32 sums: measured 3e-5. In int8
#: such a difference may also move an activation over a rounding edge, by 1/127 of its group's peak: measured 0.1 where
#: that happens in one of these shapes, else 5e-6.
LIMITS = {"fp32": 1e-4, "bf16": 1e-4, "int8": 0.3}


class PackedModule(nn.Module):
    """An ``nn.Linear`` as int8 has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._layer = pool("portable").pack(linear.weight, "int8", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear(x.reshape(-1, x.shape[-1]), self._layer).view(*x.shape[:-1], -1)


def oracle(folder: Path, format: Format, tokens: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        if format == "int8":
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear):
                    model.set_submodule(name, PackedModule(module))
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.bfloat16())
        if format == "bf16":
            for name, weight in model.named_parameters():
                if "norm" not in name and not name.endswith("bias"):
                    weight.copy_(weight.bfloat16())
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL divergence of rows of logits, nats."""
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


@pytest.fixture(scope="session")
def expected(tiny_checkpoint: Callable[..., Path]) -> Callable[[str, Format], tuple[Path, Tensor]]:
    """Folder and oracle's logits of a shape and format, computed once for all instruction sets."""
    known: dict[tuple[str, Format], tuple[Path, Tensor]] = {}

    def get(shape: str, format: Format) -> tuple[Path, Tensor]:
        if (shape, format) not in known:
            arch, overrides = TINY_SHAPES[shape]
            folder = tiny_checkpoint(arch, **overrides)
            known[shape, format] = folder, oracle(folder, format, TOKENS)
        return known[shape, format]

    return get


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_logits_equal_transformers(isa, shape, format, expected):
    folder, reference_logits = expected(shape, format)
    plan = load_plan(folder, format)
    got = run_alone(plan, pool(isa), torch.float32, TOKENS, chunk=9)
    assert (got - reference_logits).abs().max() < LIMITS[format]
    assert kl(reference_logits, got) < 5e-4  # against unquantized weights int8 would be at 2e-3 to 7e-3
    assert 1 < reference_logits.std() < 5
    halved = run_alone(plan, pool(isa), torch.bfloat16, TOKENS, chunk=70)
    assert 0 < kl(reference_logits, halved) < 3e-3  # K and V in bf16: 1e-5 to 1e-3 measured


@pytest.mark.parametrize(("arch", "window"), [("llama", None), ("mistral", 130)])
def test_long_contexts(isa, arch, window, tiny_checkpoint):
    overrides = {"max_position_embeddings": 1024} | ({"sliding_window": window} if window else {})
    folder = tiny_checkpoint(arch, **overrides)
    tokens = torch.randint(4, 300, (700,), generator=torch.Generator().manual_seed(2)).tolist()
    got = run_alone(load_plan(folder, "fp32"), pool(isa), torch.float32, tokens, chunk=333)
    assert (got - oracle(folder, "fp32", tokens)).abs().max() < 2e-4


def test_avx2_and_avx512_give_equal_bits_and_portable_nearly(tiny_checkpoint):
    require_native("avx512")
    plan = load_plan(tiny_checkpoint("qwen3"), "bf16")
    wide, middle, narrow = (
        run_alone(plan, pool(isa), torch.bfloat16, TOKENS, chunk=8) for isa in ("avx512", "avx2", "portable")
    )
    assert torch.equal(wide, middle)
    assert 0 < (wide - narrow).abs().max() < 0.1


def test_only_the_wanted_rows_come_back_in_the_order_asked(isa, tiny_checkpoint):
    plan = load_plan(tiny_checkpoint("llama"), "fp32")
    every = run_alone(plan, pool(isa), torch.float32, TOKENS[:12], chunk=12)
    ex = executor(plan, pool(isa), torch.float32, num_blocks=1)
    assert torch.equal(ex.forward(TOKENS[:12], [(0, 12, 0, [0])], [11, 2, 2]), every[[11, 2, 2]])
    assert ex.forward(TOKENS[:12], [(0, 12, 0, [0])], []).shape == (0, plan.vocab)


def test_blocks_that_do_not_fit_are_refused(isa, tiny_checkpoint):
    plan = load_plan(tiny_checkpoint("llama"), "fp32")
    with pytest.raises(ValueError, match="multiple of 16"):
        Executor(
            plan,
            pool(isa),
            torch.zeros(1, 1 << 20, dtype=torch.uint8),
            kv_dtype=torch.float32,
            block_tokens=24,
        )
    with pytest.raises(AssertionError, match="holds less"):
        Executor(
            plan, pool(isa), torch.zeros(1, 64, dtype=torch.uint8), kv_dtype=torch.float32, block_tokens=16
        )
