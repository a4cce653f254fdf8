"""The tiny checkpoints are what the other tests take them for: loadable, repeatable and not trivial."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TinyCheckpoint = Callable[..., Path]
PROMPT = "the rain in Spain stays mainly in the plain"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return result


def generate(model: Any, ids: list[int]) -> list[int]:
    output: list[int] = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()
    return output


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_transformers_loads_it_and_generates_the_same_twice(
    tiny_checkpoint: TinyCheckpoint, arch: tiny.Arch
) -> None:
    folder = tiny_checkpoint(arch)
    ids = AutoTokenizer.from_pretrained(folder).encode(PROMPT)
    first, second = load(folder), load(folder)
    assert type(first).__name__ == tiny.tiny_hf_config(arch)["architectures"][0]
    assert generate(first, ids) == generate(second, ids)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_every_weight_changes_the_output(tiny_checkpoint: TinyCheckpoint, arch: tiny.Arch) -> None:
    model = load(tiny_checkpoint(arch))
    ids = list(range(4, 40))
    before = logits(model, ids)
    for name, weight in model.named_parameters():
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(kept.roll(1, dims=-1) if weight.dim() > 1 else kept.flip(0))
        assert (logits(model, ids) - before).abs().max() > 0.05, name
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_outputs_are_peaked_but_not_certain(tiny_checkpoint: TinyCheckpoint, arch: tiny.Arch) -> None:
    best = logits(load(tiny_checkpoint(arch)), list(range(4, 104))).softmax(-1).max(-1).values
    assert 0.1 < best.mean() < 0.8


def test_the_sliding_window_matters(tiny_checkpoint: TinyCheckpoint) -> None:
    ids = list(range(4, 44))
    with_window = logits(load(tiny_checkpoint("mistral")), ids)
    without = logits(load(tiny_checkpoint("mistral", sliding_window=None)), ids)
    torch.testing.assert_close(with_window[:16], without[:16])
    assert (with_window[16:] - without[16:]).abs().max() > 0.05


def test_seed_and_perturbation(tiny_checkpoint: TinyCheckpoint) -> None:
    ids = list(range(4, 204))
    target = logits(load(tiny_checkpoint()), ids).softmax(-1)
    near = logits(load(tiny_checkpoint(perturb=0.1)), ids).softmax(-1)
    other = logits(load(tiny_checkpoint(seed=1)), ids).softmax(-1)
    overlap_near = torch.minimum(target, near).sum(-1).mean()
    overlap_other = torch.minimum(target, other).sum(-1).mean()
    assert 0.5 < overlap_near < 0.95
    assert overlap_other < 0.4


@pytest.mark.parametrize("vocab_size", [12, 300, 320])
def test_tokenizer_has_exactly_the_vocabulary(vocab_size: int) -> None:
    tokenizer = tiny.tiny_tokenizer(vocab_size)
    assert len(tokenizer) == vocab_size
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == tiny.EOS_ID


def test_tokenizer_round_trips_any_text_and_knows_chatml(tiny_checkpoint: TinyCheckpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint())
    text = "Grüße, 世界! \U0001f680\n\tthe end "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # merges are in use
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(chat).count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
