"""The setting that a figure is measured in: without it a figure says nothing."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paceline.draftmodels.data.prompts import Prompt
from paceline.draftmodels.evaluate.plan import Plan
from paceline.draftmodels.evaluate.prompts import dataset
from paceline.draftmodels.provenance import provenance
from paceline.server.engine.interface import ModelInfo


def describe(
    plan: Plan, prompts: Sequence[Prompt], model: ModelInfo | None, against: ModelInfo | None = None
) -> dict[str, Any]:
    """The setting as JSON; ``model``, and ``against``, None if they were not loaded before an interruption."""
    spec, engine = plan.config.models[0], plan.config.engine
    return {
        "target": spec.target,
        "steering": [asdict(pair) for pair in spec.steering],
        "draft": plan.draft,
        "against": plan.against,
        "dataset": dataset(plan.prompts),
        "split": split(plan),
        "n_prompts": len(prompts),
        "max_tokens": plan.max_tokens,
        "max_draft_tokens": plan.speculation.max_draft_tokens,
        "policy": plan.speculation.policy,
        "verify": plan.speculation.verify,
        "temperatures": list(plan.temperatures),
        "seed": plan.seed,
        "streams": plan.streams,
        "rounds": plan.rounds,
        "turns_within": plan.turns_within,
        "weights": spec.weights,
        "weights_loaded": None if model is None else _loaded(model, against),
        "chat_template": None if model is None else model.tokenizer.has_chat_template,
        "prefix_caching": engine.prefix_caching,
        "device": engine.device,
        "threads": engine.threads,
        "cpu": cpu_name(),
        "provenance": provenance(seed=plan.seed),
    }


def split(plan: Plan) -> str:
    """Which part of the dataset was used: all of it, or its first prompts (categories in turn)."""
    return "held-out" if plan.limit is None else f"held-out[:{plan.limit}]"


def headline(setting: Mapping[str, Any]) -> list[str]:
    """The setting in a few lines of text."""
    seed = "unseeded" if setting["seed"] is None else f"seeded from {setting['seed']}"
    loaded = setting["weights_loaded"] or {}
    formats = ", ".join(f"{who} {what}" for who, what in loaded.items())
    steered = [pair["name"] for pair in setting["steering"]]
    target = f"{setting['target']}{' steered by ' * bool(steered)}{', '.join(steered)}"
    against = "" if setting["against"] is None else f" against {setting['against']}"
    return [
        f"{target} with draft {setting['draft']}{against}",
        f"{setting['dataset']} ({setting['split']}), {setting['n_prompts']} prompts, at most {setting['max_tokens']} "
        f"tokens each, {setting['streams']} stream(s), {seed}",
        f"{setting['max_draft_tokens']} draft tokens ({setting['policy']}), verify {setting['verify']}, "
        f"{setting['rounds']} timed rounds with and without, turns within each {setting['turns_within']}, "
        "no prefix caching",
        f"weights {setting['weights']} ({formats}), {setting['threads']} threads, {setting['cpu']}",
    ]


def _loaded(model: ModelInfo, against: ModelInfo | None) -> dict[str, str]:
    """Format and kernels that run: what follows the hash in the weights' keys."""
    formats = dict(zip(("target", "draft"), map(_format, model.weights_keys), strict=False))
    if against is not None and len(against.weights_keys) > 1:
        formats["against"] = _format(against.weights_keys[1])
    return formats


def _format(weights_key: str) -> str:
    return weights_key.rpartition("/")[2]


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
