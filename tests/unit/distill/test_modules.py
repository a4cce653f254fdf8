"""Trainable drafts: equal to transformers, and unrolled steps equal to the recurrence that serving runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from paceline.draftmodels.distill.layout import lay_out
from paceline.draftmodels.distill.modules import Draft, FeatureDraft, IndependentDraft
from paceline.server.models.config import ModelConfig, parse_model_config


class Sequence(NamedTuple):
    tokens: tuple[int, ...]
    prompt_tokens: int


BATCH = [Sequence(tuple(range(5, 19)), 4), Sequence((7, 9, 8), 2), Sequence(tuple(range(60, 40, -1)), 1)]


def config_of(checkpoint: Path, **changes: Any) -> ModelConfig:
    return replace(parse_model_config(json.loads((checkpoint / "config.json").read_text())), **changes)


def randomise(draft: Draft, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(draft.named_parameters()):
            scale = 0.3 if p.dim() == 1 else 1.5 / p.shape[-1] ** 0.5
            p.copy_(("norm" in name) + scale * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_independent_draft_computes_what_transformers_does(tiny_checkpoint: Any, arch: str) -> None:
    folder = tiny_checkpoint(arch)
    config = config_of(folder)
    draft = IndependentDraft(config, train_embedding=config.tied_head, train_head=True)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = {name: p for name, p in oracle.state_dict().items() if name in draft.state_dict()}
    if not config.tied_head:  # the frozen embedding is bf16
        embedding = oracle.model.embed_tokens.weight
        embedding.data = embedding.bfloat16().float()
    draft.load_state_dict(state)
    (out,) = draft(lay_out(BATCH))
    expected = []
    for sequence in BATCH:
        states = oracle.model(torch.tensor([sequence.tokens[:-1]])).last_hidden_state[0]
        expected.append(states[sequence.prompt_tokens - 1 :])
    torch.testing.assert_close(out, torch.cat(expected), atol=2e-4, rtol=2e-4)


def serve(
    draft: FeatureDraft, tokens: tuple[int, ...], states: Tensor, verified: int, steps: int
) -> list[Tensor]:
    """The serving recurrence, position by position: rows 0..verified from the target's states, then the draft alone.

    states: [tokens, hidden], after each token. Returns the draft's state of each of the ``steps`` draft steps.
    """
    body: Any = draft.model
    c = draft.config
    keys: list[list[Tensor]] = [[] for _ in body.layers]
    values: list[list[Tensor]] = [[] for _ in body.layers]
    before, result = torch.zeros(c.hidden_size), []
    for position in range(verified + steps):
        embedded = body.embed_tokens.weight[tokens[position]].float()
        x = body.fc.weight @ torch.cat((embedded, before))
        for index, layer in enumerate(body.layers):
            x = naive_block(layer, index, x, position, keys[index], values[index], c)
        before = states[position] if position < verified else x
        if position >= verified:
            result.append(x)
    return result


def turned(h: Tensor, angle: Tensor) -> Tensor:
    half = h.shape[1] // 2
    left, right = h[:, :half], h[:, half:]
    return torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), 1)


def naive_block(
    layer: Any, index: int, x: Tensor, position: int, keys: list[Tensor], values: list[Tensor], c: ModelConfig
) -> Tensor:
    norm = lambda v, w: w * v / (v.square().mean(-1, keepdim=True) + c.rms_eps).sqrt()  # noqa: E731
    inner = norm(x, layer.input_layernorm.weight) if index > 0 else x
    attention = layer.self_attn
    q, k, v = (m(inner).view(-1, c.head_dim) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    if c.qk_norm:
        q, k = norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight)
    angle = position * torch.tensor(c.rope_inv_freq)
    keys.append(turned(k, angle))
    values.append(v)
    window = c.sliding_windows[index] or len(keys)
    heads = []
    for head, query in enumerate(turned(q, angle)):
        group = head * c.num_kv_heads // c.num_heads
        seen = torch.stack([key[group] for key in keys[-window:]])
        weights = (seen @ query / c.head_dim**0.5).softmax(0)
        heads.append(weights @ torch.stack([value[group] for value in values[-window:]]))
    x = x + attention.o_proj(torch.cat(heads))
    inner = norm(x, layer.post_attention_layernorm.weight)
    y: Tensor = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(inner)) * layer.mlp.up_proj(inner))
    return y


@pytest.mark.parametrize(
    ("arch", "layers"), [("llama", 1), ("llama", 2), ("mistral", 1), ("qwen2", 1), ("qwen3", 2)]
)
def test_unrolled_steps_equal_the_serving_recurrence(tiny_checkpoint: Any, arch: str, layers: int) -> None:
    config = config_of(tiny_checkpoint(arch), num_layers=layers, tied_head=False)
    if arch == "mistral":
        config = replace(config, sliding_windows=(6,) * layers)
    draft = FeatureDraft(config, steps=3)
    randomise(draft)
    states = [
        torch.randn(len(s.tokens), config.hidden_size, generator=torch.Generator().manual_seed(3))
        for s in BATCH
    ]
    layout = lay_out(BATCH)
    rows = torch.cat([torch.cat((torch.zeros(1, config.hidden_size), h[:-2])) for h in states])
    outputs = draft(layout, rows)
    expected: list[list[Tensor]] = [[], [], []]
    for sequence, h in zip(BATCH, states, strict=True):
        for step in (1, 2, 3):
            for t in range(sequence.prompt_tokens - 1 + step - 1, len(sequence.tokens) - 1):
                served = serve(draft, sequence.tokens, h, verified=t - step + 1, steps=step)
                expected[step - 1].append(served[-1])
    assert [len(out) for out in outputs] == [len(e) for e in expected] == [30, 27, 25]
    for out, want in zip(outputs, expected, strict=True):
        # Rounding of fp32 in another order, grown over the chain; a wrong key or position is off by 0.1 and more.
        torch.testing.assert_close(out, torch.stack(want), atol=3e-3, rtol=1e-3)
    assert (outputs[0][layout.step_rows(2)] - outputs[1]).abs().mean() > 0.1  # the steps do differ


def test_a_batch_gives_each_sequence_what_it_gets_alone(tiny_checkpoint: Any) -> None:
    config = config_of(tiny_checkpoint(), num_layers=1)
    draft = FeatureDraft(config, steps=2)
    randomise(draft)
    states = torch.randn(len(lay_out(BATCH).tokens), config.hidden_size)
    together = draft(lay_out(BATCH), states)
    counts = [len(s.tokens) - 1 for s in BATCH]
    alone = [draft(lay_out([s]), h) for s, h in zip(BATCH, states.split(counts), strict=True)]
    for step in (0, 1):
        torch.testing.assert_close(
            together[step], torch.cat([outputs[step] for outputs in alone]), atol=1e-3, rtol=1e-3
        )


def test_gradients_reach_everything_that_is_trained_and_nothing_else(tiny_checkpoint: Any) -> None:
    config = config_of(tiny_checkpoint(), num_layers=2)
    draft = FeatureDraft(config, steps=2)
    randomise(draft)
    layout = lay_out(BATCH)
    outputs = draft(layout, torch.randn(len(layout.tokens), config.hidden_size))
    sum(output.square().sum() for output in outputs).backward()
    for name, parameter in draft.named_parameters():
        trained = name not in ("model.embed_tokens.weight", "lm_head.weight")
        assert parameter.requires_grad is trained, name
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) is trained, name
    assert "model.layers.0.input_layernorm.weight" not in draft.state_dict()
    assert "model.norm.weight" not in draft.state_dict()
