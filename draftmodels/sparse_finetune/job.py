"""A recovery job with everything real: opens student, teacher and text, and runs the trainer over them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.draftmodels.data.documents import read_documents, sequences_of
from paceline.draftmodels.data.prompts import split_held_out
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.finetune.arithmetic import DTYPES
from paceline.draftmodels.finetune.decoder import Decoder, make_frozen, make_trained
from paceline.draftmodels.finetune.trainer import Parts, Trainer
from paceline.draftmodels.jobs.checkpoint import load_checkpoint
from paceline.draftmodels.jobs.ranks import Ranks
from paceline.draftmodels.jobs.show import shown
from paceline.draftmodels.provenance import provenance
from paceline.draftmodels.sparse_finetune.export import StudentAbout, export_student
from paceline.draftmodels.sparse_finetune.held_out import HeldOut
from paceline.draftmodels.sparse_finetune.masks import FixedMasks
from paceline.draftmodels.sparse_finetune.opening import OpenedStudent, open_student, open_teacher
from paceline.draftmodels.sparse_finetune.recipe import Recipe
from paceline.draftmodels.sparse_finetune.recovery import Recovery, RecoveryState
from paceline.draftmodels.sparse_finetune.report import write_report
from paceline.server.config import Machine
from paceline.server.errors import ConfigError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import EMBEDDING, HEAD, ModelConfig
from paceline.server.models.student import KL, PARENT_PERPLEXITY
from paceline.server.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Outcome:
    """What a job has made: ``best`` is the artifact with the lowest measured perplexity."""

    run: Path
    best: Path
    state: RecoveryState


def run_job(student: str, recipe: Recipe, run: Path, ranks: Ranks) -> Outcome:
    """Recover a student in the folder ``run``, from its newest checkpoint if there is one.

    Args:
        recipe: with its ``dtype`` decided.

    Raises:
        UserError: something that the user can mend, in one line.
        KeyboardInterrupt: Ctrl-C; a checkpoint has been written.
    """
    started = time.monotonic()
    opened = open_student(student)
    about = _about(opened, recipe)
    sequences, held_out = _text(opened, recipe)
    taught_by = open_teacher(opened, recipe.teacher)
    model, teacher, masks = _models(opened, taught_by, recipe)
    by_parent = taught_by[0].weights_sha256() == opened.checkpoint.manifest.base.weights_sha256
    dtype = DTYPES[recipe.dtype or "fp32"]
    measure = HeldOut(
        held_out, teacher, rows=recipe.batch_tokens, dtype=dtype, answers_only=recipe.learn == "answers"
    )
    method = Recovery(recipe, model, teacher, masks, measure, dtype=dtype, ranks=ranks)
    with shown(_described, main=ranks.is_main) as progress:
        parts = Parts(
            sequences=sequences,
            budget=recipe.budget,
            progress=progress,
            export=partial(_export, model, opened.kept, about, partial(_declared, recipe, by_parent)),
            threads=recipe.threads or max(Machine().usable_cores // ranks.world, 1),
            ranks=ranks,
            started=started,
        )
        loaded = load_checkpoint(run, RecoveryState)
        state = Trainer(recipe, method, run, parts, RecoveryState(), loaded).train()
    if ranks.is_main:
        write_report(run, {"recipe": about.recipe, "provenance": about.provenance, "student": student})
    return Outcome(run, run / "best", state)


def _text(opened: OpenedStudent, recipe: Recipe) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(for training, held out)."""
    longest, context = recipe.sequence_tokens, opened.config.context_length
    if longest > context:
        raise ConfigError(f"sequence_tokens {longest} is more than the student's context of {context}")
    assert recipe.data is not None
    documents = read_documents(Path(recipe.data), load_tokenizer(opened.checkpoint.path), longest)
    training, held_out = split_held_out(documents, recipe.held_out, recipe.seed)
    return sequences_of(training), sequences_of(held_out)


def _models(
    opened: OpenedStudent, taught_by: tuple[Checkpoint, ModelConfig], recipe: Recipe
) -> tuple[Decoder, Decoder, FixedMasks]:
    device, dtype = torch.device(recipe.device), DTYPES[recipe.dtype or "fp32"]
    student = make_trained(
        opened.checkpoint,
        opened.config,
        device,
        train_embedding=recipe.train_embedding,
        checkpointing=recipe.checkpointing,
    )
    masks = FixedMasks(
        {name: student.get_parameter(name) for name in opened.kept},
        {name: mask.to(device) for name, mask in opened.kept.items()},
    )
    return student, make_frozen(*taught_by, device, dtype), masks


def _about(opened: OpenedStudent, recipe: Recipe) -> StudentAbout:
    checkpoint = opened.checkpoint
    frozen = set() if recipe.train_embedding else {EMBEDDING, HEAD} & set(opened.config.tensor_names())
    return StudentAbout(
        parent=checkpoint.path,
        hf_config=checkpoint.hf_config,
        manifest=checkpoint.manifest,
        pattern=opened.pattern,
        recipe={"method": "train-sparse", **recipe.as_dict()},
        provenance=provenance(seed=recipe.seed),
        int8=recipe.quantize == "int8",
        untrained={name: checkpoint.tensor(name) for name in frozen},
    )


def _declared(recipe: Recipe, by_parent: bool, figures: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the manifest's ``measured``: losses against the parent by the names that its server looks for."""
    names = {"kl": KL, "teacher_perplexity": PARENT_PERPLEXITY} if by_parent else {}
    own = {names.get(name, name): value for name, value in figures.items()}
    return {"dataset": Path(recipe.data or "").name, "split": "held out", **own}


def _export(
    student: Decoder,
    kept: Mapping[str, Tensor],
    about: StudentAbout,
    declared: Callable[[Mapping[str, Any]], dict[str, Any]],
    folder: Path,
    measured: Sequence[Mapping[str, Any]],
) -> None:
    export_student(folder, student, kept, about, [declared(figures) for figures in measured])


def _described(state: RecoveryState, figures: Mapping[str, Any]) -> str:
    parts = [f"{name} {figures[name]:.3f}" for name in ("ce", "kl", "sq") if name in figures]
    best = "" if state.best_perplexity is None else f", best perplexity {state.best_perplexity:.2f}"
    return f"loss {figures['loss']:.3f} ({', '.join(parts)}){best}"
