"""``paceline evaluate draft`` on tiny models: the command, its report, and what every group of figures satisfies."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from paceline.draftmodels.evaluate.cli import app

LENGTH = 3
#: One token from the prompt and four whole blocks.
WHOLE_BLOCKS = 1 + 4 * (LENGTH + 1)
FAST = ("--max-draft-tokens", str(LENGTH), "--weights", "fp32", "--threads", "1", "--json")


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["draft", *map(str, arguments)], catch_exceptions=False)


def report(*arguments: object) -> dict[str, Any]:
    done = evaluate(*arguments, *FAST)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_sums(group: dict[str, Any]) -> None:
    """What every group of figures must satisfy."""
    histogram = group["acceptance_histogram"]
    assert len(histogram) == LENGTH + 1
    assert sum(histogram) == group["num_spec_steps"] <= group["target_forwards"]
    assert sum(n * count for n, count in enumerate(histogram)) == group["num_accepted_draft_tokens"]
    assert group["tau"] * group["target_forwards"] == pytest.approx(group["n_tokens"] - group["n_prompts"])
    kept = [sum(histogram[i + 1 :]) for i in range(LENGTH)]
    for rate, examined, count in zip(
        group["alpha_per_position"], group["examined_per_position"], kept, strict=True
    ):
        assert rate == (count / examined if examined else None)
