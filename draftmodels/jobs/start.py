"""How every training command starts: a new run in an empty folder, or an old one that goes on; and its processes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from paceline.draftmodels.jobs.recipes import R, check_new_run, save_start, saved_start
from paceline.server.errors import ConfigError

if TYPE_CHECKING:
    from paceline.draftmodels.jobs.ranks import Ranks


@dataclass(frozen=True)
class Wish(Generic[R]):
    """What a training command was asked for.

    Attributes:
        subject: what ``model`` is to the run: "target", "student" or "model".
        model: its reference.
        recipe: what ``--recipe`` names.
        flags: of recipe keys, as texts.
        load, resumed: see ``RecipeKind``.
    """

    subject: str
    model: str
    run: Path
    recipe: str | None
    resume: bool
    flags: Mapping[str, object]
    load: Callable[[str | None, Mapping[str, object]], R]
    resumed: Callable[[Mapping[str, Any], Mapping[str, object], str], R]

    def chosen(self) -> R:
        """The recipe to train by.

        Raises:
            ConfigError: a wrong recipe, or one that does not belong to the run that is to go on.
        """
        if not self.resume:
            return self.load(self.recipe, self.flags)
        if self.recipe is not None:
            raise ConfigError(
                "--recipe: a resumed run keeps the recipe that it was started with; leave it out"
            )
        before, saved = saved_start(self.run, self.subject)
        if self.model != before:
            raise ConfigError(
                f"{self.subject.upper()}: {self.run} was started with {before}, not {self.model}"
            )
        return self.resumed(saved, self.flags, str(self.run))


def begin(wish: Wish[R], prepare: Callable[[R], R] = lambda recipe: recipe) -> "tuple[R, Ranks]":
    """Start a run: logging, processes, its folder with the recipe.

    Args:
        prepare: decides what the recipe leaves to the machine, before it is kept.

    Raises:
        ConfigError: see ``Wish.chosen``; a folder that is in use.
    """
    from paceline.draftmodels.jobs.ranks import Ranks
    from paceline.server.log import configure_logging

    recipe: Any = prepare(wish.chosen())
    configure_logging("text")
    ranks = Ranks.from_environment()
    if ranks.is_main:
        if not wish.resume:
            check_new_run(wish.run)
        save_start(wish.run, wish.subject, wish.model, asdict(recipe))
    ranks.from_main(None)  # the others wait until the folder is there
    return recipe, ranks


def run_facts(outcome: Any) -> dict[str, Any]:
    """What every job's ``--json`` says; ``outcome`` has ``run``, ``best`` and ``state``."""
    state = outcome.state
    return {
        "run": str(outcome.run),
        "best": str(outcome.best),
        "steps": state.step,
        "trained_tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
    }


def pace(facts: Mapping[str, Any]) -> str:
    """``N tokens in S s (R/s)``."""
    rate = facts["tokens_per_second"]
    return f"{facts['trained_tokens']} tokens in {facts['seconds']:.0f} s ({rate:.0f}/s)"
