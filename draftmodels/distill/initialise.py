"""Where a draft starts: cut from the target, reading the target's state, random, or an existing checkpoint.

Owns which tensors a new draft gets, which stay frozen and which the artifact takes from the target. Everything random
comes from the recipe's seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.draftmodels.cut import check_layers, cut_config, parse_layers
from paceline.draftmodels.distill.config import Recipe
from paceline.draftmodels.distill.modules import Draft, FeatureDraft, IndependentDraft
from paceline.server.errors import ConfigError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import (
    EMBEDDING,
    FC,
    FINAL_NORM,
    FIRST_NORM,
    HEAD,
    READS_STATE,
    ModelConfig,
    parse_model_config,
    restricted,
)
from paceline.server.models.native_form import NativeCheckpoint, draft_vocab, head_name

_RANDOM_STD = 0.02
#: On what a layer of the target adds, where it becomes a feature draft's block. At 1 a SmolLM2 draft starts with a
#: loss of thousands of nats; 0.02 and 0.05 train alike.
_QUIET = 0.02


@dataclass(frozen=True)
class NewDraft:
    """A draft ready for training.

    Attributes:
        hf_config: its ``config.json`` in plain form.
        vocab_ids: ids that it proposes, ascending, int32 [k]; None for all.
        shared: tensors that its artifact takes from the target.
    """

    draft: Draft
    hf_config: Mapping[str, Any]
    vocab_ids: Tensor | None
    shared: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """Before there are weights: shapes, where tensors come from, what is trained."""

    hf: dict[str, Any]
    vocab_ids: Tensor | None
    tensors: dict[str, Tensor]  # found ones; others start at random
    from_target: tuple[str, ...]  # of EMBEDDING, HEAD: those that are the target's own


def own_vocab(recipe: Recipe, target: Checkpoint) -> tuple[bool, Tensor | None]:
    """Whether the recipe's checkpoint already fixes the ids that the draft proposes, and which (None: all).

    Raises:
        ConfigError: the recipe asks for another number of ids.
    """
    if is_new(recipe):
        return False, None
    ids = draft_vocab(_open(recipe.init, target))
    if ids is not None and recipe.draft_vocab is not None:
        raise ConfigError(f"draft_vocab: {recipe.init} proposes {len(ids)} ids already; leave it out")
    return ids is not None, ids


def is_new(recipe: Recipe) -> bool:
    """Whether the draft is made here, not an existing checkpoint."""
    return recipe.init in ("feature", "random") or recipe.init.startswith("layers:")


def new_draft(recipe: Recipe, target: Checkpoint, vocab_ids: Tensor | None) -> NewDraft:
    """The draft that a recipe starts from.

    Args:
        recipe: what to make.
        target: the model that it is for.
        vocab_ids: ids that it proposes, ascending, int32 [k]; None for all.

    Raises:
        ConfigError: widths that do not fit, or a layer that the target does not have.
        UserError: a checkpoint that cannot be opened.
    """
    plan = _plan(recipe, target, vocab_ids)
    embedding = _chosen(recipe.train_embedding, EMBEDDING not in plan.tensors)
    head = _chosen(recipe.train_head, HEAD not in plan.tensors)
    tied = bool(plan.hf.get("tie_word_embeddings"))
    if tied and (embedding or head) and (embedding != head or vocab_ids is not None):
        plan.hf["tie_word_embeddings"] = tied = False
    config = restricted(parse_model_config(plan.hf, where=recipe.init), plan.vocab_ids)
    draft = _module(recipe, config, embedding, head)
    _fill(draft, plan.tensors, recipe.seed)
    trained = {EMBEDDING: embedding, HEAD: head or tied}
    shared = tuple(name for name in plan.from_target if not trained[name])
    return NewDraft(draft, plan.hf, plan.vocab_ids, shared)


def _chosen(wanted: bool | None, at_random: bool) -> bool:
    return at_random if wanted is None else wanted


def _module(recipe: Recipe, config: ModelConfig, embedding: bool, head: bool) -> Draft:
    if config.reads_state:
        if embedding:
            raise ConfigError(
                "train_embedding: a draft that reads the target's state keeps the target's embedding"
            )
        return FeatureDraft(config, steps=recipe.steps(reads_state=True), train_head=head)
    if recipe.unroll is not None or recipe.step_decay != 1:
        raise ConfigError(
            f"unroll, step_decay: {recipe.init} does not read the target's state; leave them out"
        )
    return IndependentDraft(config, train_embedding=embedding, train_head=head)


# ---- one plan per kind


def _plan(recipe: Recipe, target: Checkpoint, ids: Tensor | None) -> _Plan:
    if recipe.init == "feature":
        return _feature(recipe, target, ids)
    if recipe.init == "random":
        return _random(recipe, target, ids)
    if recipe.init.startswith("layers:"):
        return _cut(parse_layers(recipe.init.removeprefix("layers:")), target, ids)
    return _existing(recipe.init, target, ids)


def _cut(layers: Sequence[int], target: Checkpoint, ids: Tensor | None) -> _Plan:
    check_layers(layers, target.hf_config["num_hidden_layers"], str(target.path.name))
    hf = cut_config(target.hf_config, layers)
    tensors = {FINAL_NORM: target.tensor(FINAL_NORM)}
    for new, old in enumerate(layers):
        tensors |= _layer(target, old, new)
    return _Plan(hf, ids, tensors | _outside(target, ids), _shareable(target))


def _feature(recipe: Recipe, target: Checkpoint, ids: Tensor | None) -> _Plan:
    count, total = recipe.layers or 1, int(target.hf_config["num_hidden_layers"])
    source = _block_source(recipe, count, total)
    hf = cut_config(target.hf_config, source or range(total - count, total))
    tensors = _outside(target, ids)
    for new, old in enumerate(source):
        tensors |= _quietened(_layer(target, old, new))
    if source:
        _read_normed_states(tensors, tensors.pop(FIRST_NORM), target.tensor(FINAL_NORM).float())
    if recipe.join_from == "state":
        # The embedding adds nothing yet: the block's first input is what the target's head reads.
        hidden = int(hf["hidden_size"])
        tensors[FC] = torch.cat((torch.zeros(hidden, hidden), torch.eye(hidden)), 1)
    return _Plan({**hf, READS_STATE: True}, ids, tensors, _shareable(target))


def _block_source(recipe: Recipe, count: int, total: int) -> range:
    """Layers of the target that the blocks start from; empty for random ones."""
    if recipe.block_from is None:
        return range(0)
    if not (recipe.block_from.isascii() and recipe.block_from.isdigit()):
        raise ConfigError(f'block_from: expected a layer number or "random", got "{recipe.block_from}"')
    first = int(recipe.block_from)
    if first + count > total:
        raise ConfigError(
            f"block_from: {count} layers from {first} on; the target has layers 0 to {total - 1}"
        )
    return range(first, first + count)


def _quietened(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer whose outputs are small beside a normed state; in the target they add to one that is not normed."""
    ends = ("o_proj.weight", "down_proj.weight")
    return {
        name: tensor.float() * _QUIET if name.endswith(ends) else tensor for name, tensor in layer.items()
    }


def _read_normed_states(tensors: dict[str, Tensor], own_norm: Tensor, final_norm: Tensor) -> None:
    """Let the first block's projections read states after the target's final norm instead of after their own."""
    usable = final_norm.abs() > 0.1 * final_norm.square().mean().sqrt()
    factor = torch.where(usable, own_norm.float() / final_norm, 0.0)
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        tensors[name] = tensors[name].float() * factor


def _random(recipe: Recipe, target: Checkpoint, ids: Tensor | None) -> _Plan:
    hf = cut_config(target.hf_config, range(min(recipe.layers or 2, target.hf_config["num_hidden_layers"])))
    like = parse_model_config(target.hf_config, where=str(target.path.name))
    hidden = recipe.hidden or like.hidden_size
    heads = recipe.heads or max(hidden // like.head_dim, 1)
    kv_heads = recipe.kv_heads or _kv_heads(heads, like.num_heads // like.num_kv_heads)
    if hidden % heads or (hidden // heads) % 2 or heads % kv_heads:
        raise ConfigError(
            f"hidden {hidden}, heads {heads}, kv_heads {kv_heads}: hidden must be heads times an even number, "
            "and heads a multiple of kv_heads"
        )
    layers = recipe.layers or 2
    hf |= {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": recipe.ffn or -(-8 * hidden // 3 // 32) * 32,
    }
    if hf.get("layer_types") is not None:
        hf["layer_types"] = [hf["layer_types"][0]] * layers
    if hidden == like.hidden_size:
        return _Plan(hf, ids, _outside(target, ids), _shareable(target))
    return _Plan({**hf, "tie_word_embeddings": False}, ids, {}, ())


def _kv_heads(heads: int, group: int) -> int:
    return heads // group if heads % group == 0 else heads


def _existing(reference: str, target: Checkpoint, ids: Tensor | None) -> _Plan:
    checkpoint = _open(reference, target)
    hf = dict(checkpoint.hf_config)
    if hf.get("vocab_size") != target.hf_config.get("vocab_size"):
        raise ConfigError(
            f"init: {reference} has {hf.get('vocab_size')} ids and the target "
            f"{target.hf_config.get('vocab_size')}; a draft needs the target's vocabulary"
        )
    has_ids = draft_vocab(checkpoint) is not None
    names = [name for name in checkpoint.tensor_names() if name not in (EMBEDDING, HEAD)]
    tensors = {name: checkpoint.tensor(name) for name in names}
    tensors |= {EMBEDDING: checkpoint.tensor(EMBEDDING)}
    head = checkpoint.tensor(HEAD if has_ids else head_name(checkpoint))
    tensors[HEAD] = head if has_ids or ids is None else head[ids.long()]
    shared = checkpoint.manifest.shared_with_target if isinstance(checkpoint, NativeCheckpoint) else ()
    return _Plan(hf, ids, tensors, tuple(shared))


def _open(reference: str, target: Checkpoint) -> Checkpoint:
    from paceline.server.models.native_form import open_model
    from paceline.server.models.sources import resolve

    path = Path(reference)
    return open_model(path if path.exists() else resolve(reference), target)


# ---- tensors


def _layer(target: Checkpoint, old: int, new: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{old}."
    names = [name for name in target.tensor_names() if name.startswith(prefix)]
    return {f"model.layers.{new}.{name.removeprefix(prefix)}": target.tensor(name) for name in names}


def _outside(target: Checkpoint, ids: Tensor | None) -> dict[str, Tensor]:
    """The target's embedding and head; of the head, the rows of the ids."""
    head = target.tensor(head_name(target))
    return {EMBEDDING: target.tensor(EMBEDDING), HEAD: head if ids is None else head[ids.long()]}


def _shareable(target: Checkpoint) -> tuple[str, ...]:
    return (EMBEDDING,) if head_name(target) == EMBEDDING else (EMBEDDING, HEAD)


@torch.no_grad()
def _fill(draft: Draft, tensors: Mapping[str, Tensor], seed: int) -> None:
    """Copy what was found; the rest is random: matrices N(0, 0.02), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        else:
            parameter.copy_(_RANDOM_STD * torch.randn(parameter.shape, generator=generator))
