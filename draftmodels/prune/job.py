"""``paceline sparsify`` with everything real: opens the target, reads or writes texts, prunes, measures, writes."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.draftmodels.artifact import check_output
from paceline.draftmodels.prune.config import Recipe
from paceline.draftmodels.prune.export import write_pruned
from paceline.draftmodels.prune.inputs import LINEARS
from paceline.draftmodels.prune.outcome import Outcome
from paceline.draftmodels.prune.perplexity import compare_streams
from paceline.draftmodels.prune.pool import Pool, pool_of
from paceline.draftmodels.prune.report import write_report
from paceline.draftmodels.prune.show import Display, Meter, shown
from paceline.draftmodels.prune.stream import Stream
from paceline.draftmodels.prune.text import Texts, read_texts
from paceline.draftmodels.prune.walk import Streams, Walk, pieces
from paceline.server.config import Machine
from paceline.server.errors import ConfigError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import EMBEDDING, ModelConfig, parse_model_config
from paceline.server.models.native_form import NativeCheckpoint, open_model
from paceline.server.models.quality import Quality
from paceline.server.models.sources import resolve
from paceline.server.models.student import KL, PARENT_PERPLEXITY, PERPLEXITY, TOP1
from paceline.server.models.tensors import CheckedTensors
from paceline.server.models.tokenizer import load_tokenizer


def sparsify(target: str, recipe: Recipe, output: Path, *, force: bool = False) -> Outcome:
    """Prune ``target`` into the folder ``output``, which appears complete or not at all.

    Args:
        target: a model reference.
        output: a new or empty folder; with ``force`` also one to replace.

    Raises:
        UserError: something that the user can mend, in one line.
    """
    check_output(output, force)
    if recipe.device == "cuda" and not Machine().cuda_available:
        raise ConfigError("--device: torch sees no CUDA device; use cpu or a torch with CUDA")
    path = resolve(target)
    checkpoint = open_model(path)
    if isinstance(checkpoint, NativeCheckpoint):
        raise ConfigError(
            f"{target} is an artifact of Paceline's; name the dense model that it was made from"
        )
    config = parse_model_config(checkpoint.hf_config, where=target)
    check_shapes(recipe, config)
    with torch.no_grad(), shown() as display:
        return _Job(target, path, checkpoint, config, recipe, output, display).work(force)


def check_shapes(recipe: Recipe, config: ModelConfig) -> None:
    """Refuse a pattern whose groups do not divide the inputs of every linear.

    Raises:
        ConfigError: names the linear.
    """
    m = recipe.goal.pattern.m
    for name in LINEARS:
        width = config.tensor_shape(f"{name}.weight")[1]
        if m and width % m:
            raise ConfigError(
                f"--pattern: the {width} inputs of {name} are not whole groups of {recipe.pattern}; "
                "take another pattern"
            )


@dataclass(frozen=True)
class _Job:
    target: str
    path: Path
    checkpoint: Checkpoint
    config: ModelConfig
    recipe: Recipe
    output: Path
    display: Display

    def work(self, force: bool) -> Outcome:
        started = time.monotonic()
        tokenizer = load_tokenizer(self.path)
        texts = read_texts(self.recipe, self.target, tokenizer, self.config.context_length)
        self.display.note(self._about_texts(texts))
        seconds = {"texts": time.monotonic() - started}
        fetch = CheckedTensors(self.checkpoint, self.config, torch.float32, torch.device(self.recipe.device))
        with pool_of(self.recipe.threads or Machine().usable_cores) as pool:
            walk, streams = self._prune(texts, fetch, pool, seconds)
            before = time.monotonic()
            quality = compare_streams(streams.held_out_dense, streams.held_out, self.config, fetch, pool)
        seconds["measuring"] = time.monotonic() - before
        measured = measured_figures(quality, texts)
        size = write_pruned(
            self.output,
            target=self.target,
            path=self.path,
            checkpoint=self.checkpoint,
            recipe=self.recipe,
            sparse=walk.sparse,
            measured=measured,
            tokenizer_sha256=tokenizer.sha256,
            force=force,
        )
        seconds["total"] = time.monotonic() - started
        kept = sum(weight.nnz for weight in walk.sparse.values())
        whole = sum(weight.out_features * weight.in_features for weight in walk.sparse.values())
        outcome = Outcome(
            self.output, 1 - kept / whole, tuple(walk.figures), quality, texts.measured_on, seconds, size
        )
        write_report(self.output, outcome, {"target": self.target, "recipe": self.recipe.as_dict()})
        return outcome

    def _prune(
        self, texts: Texts, fetch: CheckedTensors, pool: Pool, seconds: dict[str, float]
    ) -> tuple[Walk, Streams]:
        started = time.monotonic()
        embedding = fetch(EMBEDDING)
        calibration = Stream(texts.calibration, self.config, embedding, pool)
        held_out = Stream(texts.held_out, self.config, embedding, pool)
        del embedding
        total = pieces(self.recipe, self.config.num_layers, calibration, held_out)
        walk = Walk(self.recipe, self.config, fetch, pool, Meter(self.display, self.config.num_layers, total))
        sparsities = walk.allocate(calibration)
        streams = Streams(calibration, held_out.twin(), held_out)
        walk.prune(streams, sparsities)
        seconds["pruning"] = time.monotonic() - started
        return walk, streams

    def _about_texts(self, texts: Texts) -> str:
        rows = [sum(len(s.tokens) for s in part) for part in (texts.calibration, texts.held_out)]
        return (
            f"calibrating on {len(texts.calibration)} sequences of {rows[0]} tokens, measuring on "
            f"{len(texts.held_out)} of {rows[1]} ({texts.measured_on})"
        )


def measured_figures(quality: Quality, texts: Texts) -> dict[str, Any]:
    """An entry of the manifest's ``measured``."""
    return {
        "dataset": texts.measured_on,
        "split": "held out",
        "sequences": len(texts.held_out),
        "n_tokens": quality.positions,
        PERPLEXITY: quality.perplexity,
        PARENT_PERPLEXITY: quality.reference_perplexity,
        KL: quality.kl_nats,
        TOP1: quality.top1_agreement,
    }
