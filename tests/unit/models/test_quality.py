"""Quality of a plan against fp32: the figures are those of a plain computation, and worse plans look worse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from native_kernels import load_plan, pool, require_native, run_alone

from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.server.models.packer import FIRST, HEAD, LAST, LINEARS, mix
from paceline.server.models.quality import Judge, Quality, calibration_text, split
from paceline.server.models.tokenizer import load_tokenizer


@pytest.fixture
def two() -> Pool:
    require_native()
    return pool("portable")


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plainly(
    plan: DecoderPlan, reference: DecoderPlan, windows: list[list[int]], pool: Pool
) -> tuple[float, float, float, float]:
    """KL, both perplexities and top-1 agreement in fp64, token by token."""
    kl, nll, reference_nll, agreed, positions = 0.0, 0.0, 0.0, 0, 0
    for window in windows:
        got = run_alone(plan, pool, torch.bfloat16, window).double().log_softmax(-1)
        expected = run_alone(reference, pool, torch.float32, window).double().log_softmax(-1)
        for i, label in enumerate(window[1:]):
            kl += float(sum(expected[i].exp() * (expected[i] - got[i])))
            nll, reference_nll = nll - float(got[i, label]), reference_nll - float(expected[i, label])
            agreed += int(got[i].argmax() == expected[i].argmax())
            positions += 1
    both = torch.tensor([nll, reference_nll], dtype=torch.float64).div(positions).exp().tolist()
    return kl / positions, both[0], both[1], agreed / positions


def test_the_figures_are_those_of_a_plain_computation(tiny_checkpoint: TinyCheckpoint, two: Pool) -> None:
    folder = tiny_checkpoint("qwen2")
    fp32, int8 = load_plan(folder, "fp32"), load_plan(folder, "int8")
    windows = [tokens(200), tokens(2, 1), tokens(129, 2), tokens(37, 3)]
    judge = Judge(fp32, windows, two)
    quality = judge.measure(int8)
    kl, perplexity, reference, top1 = plainly(int8, fp32, windows, two)
    assert quality.positions == 199 + 1 + 128 + 36
    assert kl > 1e-5, "int8 must differ"
    # fp16 keeps log-probabilities of about -6 to 2^-9; a mean over 364 positions is a good deal better than that.
    assert quality.kl_nats == pytest.approx(kl, abs=2e-5)
    assert quality.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert quality.reference_perplexity == pytest.approx(reference, rel=1e-4)
    assert quality.top1_agreement == pytest.approx(top1, abs=2.5 / quality.positions)  # fp16 makes ties
    assert judge.measure(int8, windows=2).positions == 200
    other = load_plan(tiny_checkpoint("qwen2", 1), "fp32")  # so far off that the direction of the KL shows
    assert judge.measure(other).kl_nats == pytest.approx(plainly(other, fp32, windows, two)[0], rel=1e-3)
    assert plainly(fp32, other, windows, two)[0] != pytest.approx(
        plainly(other, fp32, windows, two)[0], rel=0.01
    )


def test_formats_are_ranked_as_they_should_be(tiny_checkpoint: TinyCheckpoint, two: Pool) -> None:
    folder = tiny_checkpoint("llama")
    plans = {format: load_plan(folder, format) for format in ("fp32", "bf16", "int8")}
    judge = Judge(plans["fp32"], [tokens(300)], two)
    kl = {format: judge.measure(plan).kl_nats for format, plan in plans.items()}
    assert kl["fp32"] < kl["bf16"] < kl["int8"]
    half = mix(plans["int8"], plans["bf16"], ["gate_up", "down", "qkv"])
    assert kl["bf16"] < judge.measure(half).kl_nats < kl["int8"]
    other = load_plan(tiny_checkpoint("llama", 1), "fp32")
    assert judge.measure(other).top1_agreement < 0.5
    assert not judge.measure(other).good


def test_mix_takes_what_is_named(tiny_checkpoint: TinyCheckpoint, two: Pool) -> None:
    folder = tiny_checkpoint("llama", num_hidden_layers=3)
    int8, bf16 = load_plan(folder, "int8"), load_plan(folder, "bf16")

    def formats(plan: DecoderPlan) -> list[str]:
        return ["".join(getattr(layer, name).format[0] for name in LINEARS) for layer in plan.layers] + [
            plan.head.format[0]
        ]

    assert formats(mix(int8, bf16, [])) == ["iiii"] * 3 + ["i"]
    assert formats(mix(int8, bf16, ["down", HEAD])) == ["iiib"] * 3 + ["b"]
    assert formats(mix(int8, bf16, [FIRST, "qkv"])) == ["bbbb", "biii", "biii", "i"]
    assert formats(mix(int8, bf16, [LAST])) == ["iiii", "iiii", "bbbb", "i"]


def test_the_bar() -> None:
    met = Quality(0.02, 10.099, 10.0, 0.9, 100)
    assert met.good
    assert met.perplexity_change == pytest.approx(0.0099)
    assert not replace(met, kl_nats=0.0201).good
    assert not replace(met, perplexity=10.11).good
    assert not replace(met, perplexity=9.89).good  # other text than fp32's is no better for being likelier
    assert replace(met, perplexity=9.91, top1_agreement=0.0).good
    assert str(met) == "KL 0.0200, perplexity +0.99%, top-1 90.0%"
    assert Quality(**json.loads(json.dumps(met.as_dict()))) == met


def test_windows() -> None:
    assert split(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert split(range(9), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert split([], 4) == []


def test_the_text_is_varied(tiny_checkpoint: TinyCheckpoint) -> None:
    text = calibration_text()
    assert len(text) > 6000
    for sample in ("def ", "SELECT", "Assistant:", "pünktlich", "春", "47,133"):
        assert sample in text
    assert len(load_tokenizer(Path(tiny_checkpoint("llama"))).encode(text)) > 2000
