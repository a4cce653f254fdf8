"""Who is asked for a round's answers, at which temperatures."""

from pathlib import Path
from typing import Any

import pytest

from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.distill.config import load_recipe
from paceline.draftmodels.distill.sources import EngineText
from paceline.server.errors import ConfigError


class Engine:
    """Answers every prompt with its temperature in tenths, and notes the seeds."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def use_draft(self, folder: Path | None) -> None: ...

    def generate(
        self, prompts: Any, *, temperature: float, max_tokens: int, seed: int
    ) -> list[TokenSequence]:
        self.seeds.append(seed)
        return [TokenSequence((*prompt, round(10 * temperature)), len(prompt)) for prompt in prompts]


class Prompts:
    def of_round(self, round_: int) -> list[Prompt]:
        return [Prompt((i,)) for i in range(5)]


def test_prompts_take_turns_at_the_temperatures(tmp_path: Path) -> None:
    engine, recipe = Engine(), load_recipe(None, {"temperature": "0,0.5"})
    text = EngineText(recipe, engine, Prompts(), tmp_path)  # type: ignore[arg-type]
    found = text.sequences(0, None)
    assert sorted(s.tokens for s in found) == [(0, 0), (1, 5), (2, 0), (3, 5), (4, 0)]
    text.sequences(1, None)
    assert len(set(engine.seeds)) == 4
    assert text.sequences(0, None) == found  # from its shard
    assert len(engine.seeds) == 4


@pytest.mark.parametrize("wrong", ["warm", "0,", "-1", "1;2"])
def test_temperatures_are_checked_before_anything_starts(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--temperature: expected temperatures such as 1 or"):
        load_recipe(None, {"temperature": wrong})
