"""Policies put into an engine for tests, and the adaptive one with times that do not depend on the machine."""

import dataclasses
from typing import Any

from paceline.server.decoding.policy import AdaptivePolicy, StepWork
from paceline.server.engine.engine import Engine


class Timeless(AdaptivePolicy):
    """Told that a target step takes 1 s, each of its rows 0.05 s and a forward of the draft 0.1 s: how often it drafts
    then depends on acceptance alone."""

    def on_step(self, work: StepWork) -> None:
        target, draft = 1 + 0.05 * work.rows, 0.1 * work.draft_forwards
        super().on_step(dataclasses.replace(work, target_seconds=target, draft_seconds=draft))


def with_policy(engine: Engine, policy: Any) -> Engine:
    for model in engine._models.values():
        object.__setattr__(model, "policy", policy)
    return engine
