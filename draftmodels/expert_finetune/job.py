"""An expert's job with everything real: opens model and examples, and runs the trainer over them."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline.draftmodels.data.documents import sequences_of
from paceline.draftmodels.data.prompts import split_held_out
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.expert_finetune.answers import ExactMatch
from paceline.draftmodels.expert_finetune.examples import Reader
from paceline.draftmodels.expert_finetune.export import ExpertAbout, add_measured, export_expert
from paceline.draftmodels.expert_finetune.recipe import Recipe
from paceline.draftmodels.expert_finetune.report import write_report
from paceline.draftmodels.expert_finetune.supervised import Examination, Supervised
from paceline.draftmodels.finetune.arithmetic import DTYPES
from paceline.draftmodels.finetune.batch import grouped, make_batch
from paceline.draftmodels.finetune.decoder import Decoder, make_trained
from paceline.draftmodels.finetune.method import FinetuneState
from paceline.draftmodels.finetune.trainer import Parts, Trainer
from paceline.draftmodels.jobs.checkpoint import load_checkpoint
from paceline.draftmodels.jobs.ranks import Ranks
from paceline.draftmodels.jobs.show import shown
from paceline.draftmodels.provenance import provenance
from paceline.server.config import Machine
from paceline.server.errors import ConfigError
from paceline.server.models.checkpoint import Checkpoint, open_checkpoint
from paceline.server.models.config import ModelConfig, parse_model_config
from paceline.server.models.manifest import Base, read_manifest
from paceline.server.models.native_form import is_native_form
from paceline.server.models.sources import resolve
from paceline.server.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Outcome:
    """What a job has made.

    Attributes:
        best: folder of the expert with the lowest measured loss.
        answers: exact-match figures of it; empty where none were asked for.
    """

    run: Path
    best: Path
    state: FinetuneState
    answers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Opened:
    """The model that training starts from."""

    reference: str
    checkpoint: Checkpoint
    config: ModelConfig
    reader: Reader


def run_job(model: str, recipe: Recipe, run: Path, ranks: Ranks) -> Outcome:
    """Make an expert in the folder ``run``, from its newest checkpoint if there is one.

    Args:
        recipe: with its ``dtype`` decided.

    Raises:
        UserError: something that the user can mend, in one line.
        KeyboardInterrupt: Ctrl-C; a checkpoint has been written.
    """
    started = time.monotonic()
    opened = _open(model, recipe)
    training, held_out = _examples(opened.reader, recipe)
    about = _about(opened, recipe)
    device, dtype = torch.device(recipe.device), DTYPES[recipe.dtype or "fp32"]
    decoder = make_trained(
        opened.checkpoint,
        opened.config,
        device,
        train_embedding=recipe.train_embedding,
        checkpointing=recipe.checkpointing,
    )
    export = partial(_export, decoder, about, {"dataset": Path(recipe.data or "").name, "split": "held out"})
    threads = recipe.threads or max(Machine().usable_cores // ranks.world, 1)
    match = _matching(opened.reader, held_out, recipe, threads)
    answering = partial(_answered, match, export, run / "current") if match and recipe.answer_always else None
    batches = [
        make_batch(group, device, answers_only=recipe.learn == "answers")
        for group in grouped(held_out, recipe.batch_tokens)
    ]
    examination = Examination(batches, DTYPES[recipe.store], answering)
    with shown(_described, main=ranks.is_main) as progress:
        parts = Parts(
            sequences=training,
            budget=recipe.budget(sum(len(sequence.tokens) for sequence in training)),
            progress=progress,
            export=export,
            threads=threads,
            ranks=ranks,
            started=started,
        )
        method = Supervised(decoder, examination, dtype=dtype, ranks=ranks)
        loaded = load_checkpoint(run, FinetuneState)
        state = Trainer(recipe, method, run, parts, FinetuneState(), loaded).train()
        answers: Mapping[str, Any] = {}
        if match and ranks.is_main:
            progress.note("answering held-out prompts")
            answers = match.of(run / "best")
            add_measured(run / "best", answers)
    if ranks.is_main:
        write_report(
            run,
            {
                "model": model,
                "recipe": about.recipe,
                "provenance": about.provenance,
                "answers": dict(answers),
            },
        )
    return Outcome(run, run / "best", state, answers)


def _open(reference: str, recipe: Recipe) -> _Opened:
    path = resolve(reference)
    if path.is_dir() and is_native_form(path):
        raise ConfigError(
            f"MODEL: {reference} is in native form; make a plain checkpoint of it with paceline export --standalone"
        )
    checkpoint = open_checkpoint(path)
    config = parse_model_config(copy.deepcopy(checkpoint.hf_config), where=reference)
    if recipe.sequence_tokens > config.context_length:
        raise ConfigError(
            f"sequence_tokens {recipe.sequence_tokens} is more than the model's context of {config.context_length}"
        )
    reader = Reader(load_tokenizer(path), recipe.sequence_tokens, recipe.template)
    reader.check(reference)
    return _Opened(reference, checkpoint, config, reader)


def _examples(reader: Reader, recipe: Recipe) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(for training, held out)."""
    assert recipe.data is not None
    documents = reader.read(Path(recipe.data))
    training, held_out = split_held_out(documents, recipe.held_out, recipe.seed)
    return sequences_of(training), sequences_of(held_out)


def _about(opened: _Opened, recipe: Recipe) -> ExpertAbout:
    checkpoint = opened.checkpoint
    base = Base(
        id=opened.reference,
        tokenizer_sha256=opened.reader.tokenizer.sha256,
        vocab_size=int(checkpoint.hf_config["vocab_size"]),
        weights_sha256=checkpoint.weights_sha256(),
    )
    start = read_manifest(checkpoint.path) if checkpoint.path.is_dir() else None
    before = {} if start is None else {"start": {"recipe": start.recipe, "provenance": start.provenance}}
    return ExpertAbout(
        base=base,
        parent=checkpoint.path,
        hf_config=checkpoint.hf_config,
        recipe={"method": "train-expert", **recipe.as_dict(), **before},
        provenance=provenance(seed=recipe.seed),
        store=recipe.store,
    )


def _matching(
    reader: Reader, held_out: Sequence[TokenSequence], recipe: Recipe, threads: int
) -> ExactMatch | None:
    """None where nothing is to be answered, or every right answer was cut short."""
    whole = [sequence for sequence in held_out if reader.is_whole(sequence)][: recipe.answer_prompts]
    return ExactMatch(whole, recipe.store, threads, recipe.device) if whole else None


def _export(
    model: Decoder,
    about: ExpertAbout,
    where: Mapping[str, Any],
    folder: Path,
    measured: Sequence[Mapping[str, Any]],
) -> None:
    export_expert(folder, model, about, [{**where, **figures} for figures in measured])


def _answered(match: ExactMatch, export: Any, folder: Path) -> Mapping[str, Any]:
    export(folder, ())
    return match.of(folder)


def _described(state: FinetuneState, figures: Mapping[str, Any]) -> str:
    best = "" if state.best_perplexity is None else f", best held-out perplexity {state.best_perplexity:.3f}"
    return f"loss {figures['loss']:.3f}{best}"
