"""A training job with everything real: opens target, engine, prompts and teacher, and runs the trainer over them."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.data.templates import end_of_answer
from paceline.draftmodels.distill.config import Recipe
from paceline.draftmodels.distill.export import ArtifactAbout, export_draft
from paceline.draftmodels.distill.initialise import NewDraft, new_draft, own_vocab
from paceline.draftmodels.distill.layout import Tokens
from paceline.draftmodels.distill.objective import Rows
from paceline.draftmodels.distill.parts import DraftState, Parts, without_vocab
from paceline.draftmodels.distill.report import write_report
from paceline.draftmodels.distill.sources import EngineJudge, EngineText, open_prompts
from paceline.draftmodels.distill.trainer import Trainer
from paceline.draftmodels.distill.vocab import TOP_K, expected_vocabulary
from paceline.draftmodels.jobs.checkpoint import Loaded, load_checkpoint
from paceline.draftmodels.jobs.ranks import Ranks
from paceline.draftmodels.jobs.show import shown
from paceline.draftmodels.local_engine import LocalEngine
from paceline.draftmodels.provenance import provenance
from paceline.draftmodels.targets import steering_note, target_spec
from paceline.draftmodels.teacher import Teacher
from paceline.server.config import Machine
from paceline.server.errors import ConfigError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.manifest import MANIFEST, Base, read_manifest
from paceline.server.models.native_form import open_model
from paceline.server.models.sources import resolve

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a job has made: ``best`` is the artifact with the highest measured tau."""

    run: Path
    best: Path
    state: DraftState


class EngineTeacher:
    """``parts.Teacher`` over the engine's target."""

    def __init__(self, local: LocalEngine, vocab_ids: Tensor | None, recipe: Recipe) -> None:
        self._teacher = Teacher(local, vocab_ids, top_k=recipe.top_k)
        self._temperature = recipe.loss_temperature

    def rows(self, sequences: Sequence[Tokens]) -> Sequence[Rows]:
        """See ``parts.Teacher``."""
        return self._teacher.rows(cast(Sequence[TokenSequence], sequences), self._temperature)


def run_job(target: str, recipe: Recipe, run: Path, ranks: Ranks) -> Outcome:
    """Train a draft in the folder ``run``, from its newest checkpoint if there is one.

    Raises:
        UserError: something that the user can mend, in one line.
        KeyboardInterrupt: Ctrl-C; a checkpoint has been written.
    """
    started = time.monotonic()
    if recipe.device == "cuda" and not Machine().cuda_available:
        raise ConfigError("device: torch sees no CUDA device; use --device cpu or a torch with CUDA")
    path = resolve(target_spec(target).target)
    checkpoint = open_model(path)
    threads = recipe.threads or max(Machine().usable_cores // ranks.world, 1)
    local = LocalEngine(
        target, weights=recipe.weights, threads=threads, streams=recipe.streams, device=recipe.device
    )
    try:
        return _Job(target, path, checkpoint, recipe, run, ranks, local, threads, started).work()
    finally:
        local.close()


@dataclass(frozen=True)
class _Job:
    target: str
    path: Path
    checkpoint: Checkpoint
    recipe: Recipe
    run: Path
    ranks: Ranks
    local: LocalEngine
    threads: int
    started: float

    def work(self) -> Outcome:
        recipe, run = self.recipe, self.run
        loaded = load_checkpoint(run, DraftState)
        about = self._about()
        if loaded is not None:
            self._check_steering(about)
        # Ranks other than the main one write nothing: it tells them what it has found or made.
        prompts = open_prompts(recipe, self.local, run) if self.ranks.is_main else None
        text = None if prompts is None else EngineText(recipe, self.local, prompts, run / "shards")
        vocab_ids = self._vocabulary(text, loaded)
        new = new_draft(recipe, self.checkpoint, vocab_ids)
        with shown(_described, main=self.ranks.is_main) as progress:
            parts = Parts(
                text=cast(EngineText, text),
                teacher=EngineTeacher(self.local, vocab_ids, recipe),
                judge=EngineJudge(recipe, self.local, [] if prompts is None else prompts.held_out),
                progress=progress,
                export=partial(_export, new, about),
                threads=self.threads,
                ranks=self.ranks,
                started=self.started,
            )
            state = Trainer(recipe, new, run, parts, loaded).train()
        if self.ranks.is_main:
            write_report(run, {"recipe": about.recipe, "provenance": about.provenance, "target": self.target})
        return Outcome(run, run / "best", state)

    def _vocabulary(self, text: EngineText | None, loaded: Loaded[DraftState] | None) -> Tensor | None:
        fixed, ids = own_vocab(self.recipe, self.checkpoint)
        if fixed or self.recipe.draft_vocab is None:
            return ids
        if loaded is not None:
            return without_vocab(loaded)[1]
        return self.ranks.from_main(None if text is None else self._chosen(text, self.recipe.draft_vocab))

    def _chosen(self, text: EngineText, size: int) -> Tensor:
        teacher = Teacher(
            self.local, None, top_k=min(TOP_K, self.local.config.vocab_size), dtype=torch.float32
        )
        tokenizer = self.local.tokenizer
        ids, mass = expected_vocabulary(
            teacher.rows(text.by_target(0)),
            size,
            vocab_size=self.local.config.vocab_size,
            always=sorted({*tokenizer.eos_ids, *end_of_answer(tokenizer)}),
        )
        _log.info("draft vocabulary of %d ids: %.2f%% of the target's probability", size, 100 * mass)
        return ids

    def _check_steering(self, about: ArtifactAbout) -> None:
        """Refuse to go on with a teacher that a changed configuration file has changed."""
        folder = self.run / "current"
        manifest = read_manifest(folder) if folder.is_dir() else None
        now = json.loads(json.dumps(list(about.steering)))
        if manifest is not None and manifest.extra.get("steering", []) != now:
            raise ConfigError(
                f"--resume: {self.target} is not steered as when {self.run} was started, which {folder / MANIFEST} "
                "tells; change it back, or start another run"
            )

    def _about(self) -> ArtifactAbout:
        base = Base(
            id=self.local.spec.target,
            tokenizer_sha256=self.local.tokenizer.sha256,
            vocab_size=int(self.checkpoint.hf_config["vocab_size"]),
            weights_sha256=self.checkpoint.weights_sha256(),
        )
        local, steering = self.local, self.local.steering
        note = () if steering is None else steering_note(local.spec, local.target, steering)
        return ArtifactAbout(base, self.path, self.recipe.as_dict(), provenance(seed=self.recipe.seed), note)


def _export(new: NewDraft, about: ArtifactAbout, folder: Path, measured: Sequence[Mapping[str, Any]]) -> None:
    export_draft(folder, new, about, measured)


def _described(state: DraftState, figures: Mapping[str, Any]) -> str:
    alphas = " ".join(f"{alpha:.3f}" for alpha in state.running_alpha)
    return f"loss {figures['loss']:.3f}, alpha {alphas}"
