"""Held-out prompts: the built-in set or a file, evenly over the categories; formats are those of ``data.prompts``."""

from collections.abc import Sequence
from importlib.resources import as_file, files
from itertools import chain, zip_longest
from pathlib import Path

from paceline.draftmodels.data.prompts import Prompt, read_prompts
from paceline.server.engine.interface import Tokenizer

#: What stands for the built-in set on the command line, and how records name it.
BUILT_IN = "built-in"
BUILT_IN_DATASET = "paceline-chat"


def read(source: str, tokenizer: Tokenizer, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file or the built-in set.

    Args:
        source: path, or ``built-in``.
        limit: how many to take at most, the categories in turn.

    Returns:
        Prompts in an order in which the categories alternate, so that parallel streams mix them.

    Raises:
        DataError: unreadable, empty, or a bad line (named with its number).
    """
    if source != BUILT_IN:
        return _alternate(read_prompts(Path(source), tokenizer))[:limit]
    with as_file(files(__package__).joinpath("prompts.jsonl")) as path:
        return _alternate(read_prompts(path, tokenizer))[:limit]


def dataset(source: str) -> str:
    """How records name the set that ``source`` stands for; no folders, which differ from machine to machine."""
    return BUILT_IN_DATASET if source == BUILT_IN else Path(source).name


def _alternate(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Categories in turn, each in its own order."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    return [p for p in chain.from_iterable(zip_longest(*groups.values())) if p is not None]
