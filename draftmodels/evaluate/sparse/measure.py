"""The measurement as a whole: load both models once, find the losses, then time them in the serving engine."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.evaluate import prompts as held_out
from paceline.draftmodels.evaluate.asking import Unobserved
from paceline.draftmodels.evaluate.progress import progress
from paceline.draftmodels.evaluate.setting import cpu_name
from paceline.draftmodels.evaluate.sparse.losses import Losses, measure_losses
from paceline.draftmodels.evaluate.sparse.plan import Plan, warn_of_other_weights
from paceline.draftmodels.evaluate.sparse.report import Found
from paceline.draftmodels.evaluate.sparse.sizes import bytes_per_forward, sparsity_per_layer
from paceline.draftmodels.evaluate.sparse.speed import Rounds, summarize, time_rounds, variants
from paceline.draftmodels.evaluate.sparse.text import dataset, last_words, read_text
from paceline.draftmodels.provenance import provenance
from paceline.server.engine.build import wire
from paceline.server.engine.native import BuiltEngine, NativeEngine
from paceline.server.engine.parts import Parts, load_parts, make_loader
from paceline.server.errors import ArtifactError, ConfigError
from paceline.server.models.loader import LoadedModel, ModelLoader
from paceline.server.models.manifest import check_tokenizer
from paceline.server.models.native_form import open_model

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcome:
    """What has been measured so far, so that it survives an interruption."""

    loaded: dict[str, str] = field(default_factory=dict)
    losses: Losses | None = None
    rounds: Rounds = field(default_factory=Rounds)
    found: Found | None = None
    n_prompts: int = 0
    interrupted: bool = False


def measure(plan: Plan, outcome: Outcome) -> None:
    """Fill ``outcome``; a Ctrl-C ends the timing, and what was found before it is kept.

    Raises:
        UserError: a model, prompts or a text that cannot be loaded or do not fit each other.
        EngineError: the engine failed.
    """
    loader = make_loader(plan.config.engine)
    parent, student = (load_parts(spec, loader) for spec in plan.config.models)
    check_pair(plan, parent, student)
    prompts = held_out.read(plan.prompts, parent.tokenizer, plan.limit)
    _check_lengths(prompts, plan, (parent, student))
    outcome.n_prompts = len(prompts)
    outcome.loaded = {
        who: _format(model) for who, model in (("parent", parent.target), ("student", student.target))
    }
    if parent.draft is not None:
        outcome.loaded["draft"] = _format(parent.draft)
    try:
        outcome.losses = _losses(plan, parent, student, loader)
        if plan.rounds:
            asyncio.run(_time(plan, (parent, student), loader, prompts, outcome.rounds))
    except KeyboardInterrupt:
        outcome.interrupted = True
    if outcome.losses is not None:
        layers = sparsity_per_layer(open_model(student.target.path), student.target.config)
        sizes = (bytes_per_forward(parent.target), bytes_per_forward(student.target))
        outcome.found = Found(outcome.losses, summarize(outcome.rounds.done), layers, sizes)


def check_pair(plan: Plan, parent: Parts, student: Parts) -> None:
    """See that both speak of the same tokens.

    Raises:
        ArtifactError: other tokenizers or vocabularies.
    """
    check_tokenizer(parent.tokenizer.sha256, student.tokenizer.sha256)
    sizes = [part.target.config.vocab_size for part in (parent, student)]
    if sizes[0] != sizes[1]:
        raise ArtifactError(f"{plan.student} knows {sizes[1]} ids, but its parent {plan.parent} {sizes[0]}")
    warn_of_other_weights(plan.manifest, parent.target.weights_sha256, plan.parent)


def describe(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The setting as JSON: without it a figure says nothing."""
    spec, engine = plan.config.models[0], plan.config.engine
    return {
        "parent": plan.parent,
        "student": plan.student,
        "draft": plan.draft,
        "dataset": dataset(plan.text),
        "split": f"held-out[:{plan.text_tokens} tokens]",
        "prompts": held_out.dataset(plan.prompts),
        "n_prompts": outcome.n_prompts,
        "max_tokens": plan.max_tokens,
        "max_draft_tokens": spec.speculation.max_draft_tokens if plan.draft else None,
        "policy": spec.speculation.policy if plan.draft else None,
        "temperature": 0.0,
        "rounds": plan.rounds,
        "weights": spec.weights,
        "weights_loaded": outcome.loaded,
        "device": engine.device,
        "threads": engine.threads,
        "cpu": cpu_name(),
        "provenance": provenance(),
    }


def _losses(plan: Plan, parent: Parts, student: Parts, loader: ModelLoader) -> Losses:
    context = min(part.target.config.context_length for part in (parent, student))
    sequences = read_text(plan.text, parent.tokenizer, plan.text_tokens, context)
    words = [last_words(sequence, parent.tokenizer) for sequence in sequences]
    with progress(len(sequences)) as shown:
        shown.start("losses")
        return measure_losses(parent.target, student.target, sequences, words, loader, shown.add)


async def _time(
    plan: Plan, parts: Sequence[Parts], loader: ModelLoader, prompts: Sequence[Prompt], into: Rounds
) -> None:
    wiring = wire(parts, plan.config.engine, loader)
    infos = {name: model.info for name, model in wiring.served.items()}
    engine = NativeEngine(
        lambda: BuiltEngine(wiring.engine(Unobserved(), seed=0), infos),
        max_queued_requests=plan.config.server.max_queued_requests,
    )
    chosen = variants(with_draft=plan.draft is not None)
    await engine.start()
    try:
        with progress(plan.rounds * len(chosen) * len(prompts)) as shown:
            await time_rounds(
                engine,
                chosen,
                prompts,
                rounds=plan.rounds,
                max_tokens=plan.max_tokens,
                into=into,
                shown=shown,
            )
    finally:
        await engine.stop()


def _check_lengths(prompts: Sequence[Prompt], plan: Plan, parts: Sequence[Parts]) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    context = min(shape.config.context_length for part in parts for shape, _ in part.members)
    if longest + plan.max_tokens > context:
        raise ConfigError(
            f"--prompts: the longest has {longest} tokens, which with --max-tokens {plan.max_tokens} exceed the "
            f"context of {context}; lower --max-tokens or leave that prompt out"
        )


def _format(model: LoadedModel) -> str:
    """Format and kernels that run: what follows the hash in the weights' key."""
    return model.key.rpartition("/")[2]
