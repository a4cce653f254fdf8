"""The keys that recipes of fine-tuning jobs share, and what follows from them: limits, steps, the learning rate.

Kinds of jobs derive from it, and say again what is otherwise for them (a default, a help text).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from paceline.draftmodels.jobs.budget import Patience, parse_count, parse_seconds
from paceline.draftmodels.jobs.recipes import Places
from paceline.server.config.schema import key_field

#: What a resumed job may have otherwise than before.
CHANGEABLE = ("max_time", "max_tokens", "max_steps", "patience", "threads", "checkpointing")
#: Least fall of the log of the perplexity that counts as better, for early stopping: 0.1%.
_LEAST_GAIN = 0.001


@dataclass(frozen=True)
class FinetuneRecipe:
    """What to learn from, how and for how long. None stands for "auto" or "none", see each key's help."""

    #: Keys that name files or models: provenance keeps the names of files only.
    references: ClassVar[tuple[str, ...]] = ("data",)

    data: str | None = key_field("File to train on.", None, none_word="none")
    learn: Literal["answers", "all"] = key_field(
        "Tokens that have a loss: those of answers, or those of prompts, too.", "answers"
    )
    sequence_tokens: int = key_field(
        "Longest sequence, tokens: longer texts are cut into pieces, answers are cut short.", 512, low=2
    )
    batch_tokens: int = key_field("Tokens per forward, prompts included.", 1024, low=1)
    accumulate: int = key_field("Forwards whose gradients make one step, over all ranks.", 1, low=1)
    lr: float = key_field("Peak learning rate; it falls to 0 in a straight line.", 3e-4, above=0)
    warm_up: int = key_field("Steps in which the rate rises.", 20, low=0)
    weight_decay: float = key_field("AdamW's weight decay of matrices.", 0.0, low=0)
    grad_clip: float = key_field("Longest gradient, over all parameters.", 1.0, above=0)
    train_embedding: bool = key_field("Train the embedding and the head, too.", False)
    dtype: Literal["fp32", "bf16"] | None = key_field(
        "Arithmetic of matrices (autocast), weights stay fp32; auto is bf16 where the processor multiplies it.",
        None,
    )
    checkpointing: bool = key_field(
        "Keep only the outputs of blocks for the backward pass, and compute the rest again: less memory, slower.",
        False,
    )
    device: Literal["cpu", "cuda"] = key_field("Where models run.", "cpu")
    threads: int | None = key_field("CPU threads; auto takes the physical cores.", None, low=1, high=1024)
    max_tokens: str | None = key_field(
        "Stop after this many trained tokens, such as 2M.", None, none_word="none"
    )
    max_steps: str | None = key_field("Stop after this many steps.", None, none_word="none")
    max_time: str | None = key_field("Stop after this time, such as 20m.", None, none_word="none")
    patience: int = key_field(
        "Stop after this many measurements without a better perplexity; 0 never.", 0, low=0
    )
    held_out: int = key_field("Texts or prompts kept out of training, to measure on.", 32, low=1)
    eval_every: int = key_field("Measure every so many steps.", 50, low=1)
    seed: int = key_field("Seed of everything random.", 0, low=0)

    @property
    def stopping(self) -> Patience:
        """When to stop early; scores are minus the log of perplexities."""
        return Patience(self.patience, _LEAST_GAIN)

    @property
    def step_tokens(self) -> int:
        """Tokens per optimiser step, over all ranks."""
        return self.batch_tokens * self.accumulate

    def limits(self) -> tuple[float | None, int | None, int | None]:
        """(seconds, tokens, steps) as far as they are limited."""
        return (
            None if self.max_time is None else parse_seconds(self.max_time, "max_time"),
            None if self.max_tokens is None else parse_count(self.max_tokens, "max_tokens"),
            None if self.max_steps is None else parse_count(self.max_steps, "max_steps"),
        )

    def check_limits(self, places: Places) -> None:
        """Refuse amounts that are none.

        Raises:
            ConfigError: names the place that it was read from.
        """
        for name, parse in (
            ("max_time", parse_seconds),
            ("max_tokens", parse_count),
            ("max_steps", parse_count),
        ):
            if getattr(self, name) is not None:
                parse(getattr(self, name), places[name])

    def rate(self, step: int, used: float) -> float:
        """Learning rate of step ``step`` (from 0) after the share ``used`` of the budget: a straight line to 0, times a
        warm-up."""
        rising = min((step + 1) / self.warm_up, 1.0) if self.warm_up else 1.0
        return self.lr * rising * max(1.0 - used, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """By the names that files use, as provenance; files by their names alone."""
        plain = asdict(self)
        for name in self.references:
            value = plain[name]
            plain[name] = Path(value).name if value is not None and Path(value).exists() else value
        return plain
