"""A plan beside what the engine really does: ``python -m paceline.server.planning.check``.

Decodes SmolLM2 in int8 through the native engine at several batch sizes, without a draft and with fixed blocks of the
bundled one, and reads a prompt; prints predicted and measured milliseconds of every step and their ratio, and JSON
last. Every round measures the machine's rates anew, before and after what is predicted from them. The acceptance that
goes into the prediction is that of the run, as time is what is checked; tau is compared with the formula. Exit codes:
0 done, 1 the kernels or the model are missing.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from paceline.kernels.bench.record import RESULTS, described, say, store
from paceline.kernels.cpu.library import Pool
from paceline.server.config import EngineConfig, ModelSpec, PacelineConfig, SpeculationConfig, resolve
from paceline.server.engine.build import Wiring, wire
from paceline.server.engine.interface import RequestStats, StepStats
from paceline.server.engine.parts import load_parts, make_loader
from paceline.server.engine.request import Request, SamplingParams, SpeculationParams
from paceline.server.errors import ConfigError, UserError
from paceline.server.models.quality import calibration_text
from paceline.server.planning.assumptions import CPU_OVERHEADS
from paceline.server.planning.footprint import Footprint, footprint
from paceline.server.planning.measured import Rates, measure
from paceline.server.planning.roofline import Machine, prefill_seconds
from paceline.server.planning.speculation import Draft, draft_seconds, step, tau

MODEL, DRAFT = "smollm2-135m-instruct", "smollm2-135m-draft"
BATCHES = (1, 2, 4, 8, 16)
BLOCKS = (0, 2, 4)
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 48
PREFILL_TOKENS = 768
_SPAN = 7  # tokens between the beginnings of two prompts


@dataclass
class Watch:
    """What the engine tells of its steps; see ``EngineObserver``."""

    steps: list[StepStats] = field(default_factory=list)

    def on_step(self, stats: StepStats) -> None:
        """Keep it."""
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the steps in which all sequences decoded.

    Attributes:
        step_s: wall clock; ``around_s`` the part of it in neither the target's forward nor drafting.
        context: tokens that sequences had.
        alpha: accepted of the examined draft tokens; ``tokens`` per sequence and step.
    """

    step_s: float
    around_s: float
    draft_s: float
    context: float
    alpha: float
    tokens: float


class Bench:
    """The served model, ready to run batches."""

    def __init__(self, model: str, draft: str, threads: int | None) -> None:
        speculation = SpeculationConfig(draft=draft, policy="fixed", ngram=False)
        spec = ModelSpec("check", model, "int8", speculation=speculation)
        engine = EngineConfig(threads=threads, device="cpu", prefix_caching=False, kv_cache_gib=0.25)
        config = resolve(PacelineConfig(engine=engine, models=(spec,)))
        loader = make_loader(config.engine)
        if loader.pool is None:
            raise ConfigError("the CPU kernels are switched off or were not built; this checks nothing else")
        self.pool: Pool = loader.pool
        parts = load_parts(config.models[0], loader)
        assert parts.draft is not None
        self._wiring: Wiring = wire([parts], config.engine, loader)
        self.chunk = config.engine.max_batch_tokens
        self.target: Footprint = footprint(parts.target.config, "int8", keeps_states=parts.reads_states)
        self.draft: Footprint = footprint(parts.draft.config, "int8")
        tokens = parts.tokenizer.encode(calibration_text(), add_special_tokens=False)
        self._tokens = [token for token in tokens if token < parts.target.config.vocab_size]

    def decode(self, sequences: int, block: int) -> Measured:
        """Run a batch to its end."""
        watch, steps = Watch(), list[tuple[float, int]]()
        engine = self._wiring.engine(watch, seed=0)
        for i in range(sequences):
            engine.submit(self._request(i, PROMPT_TOKENS, OUTPUT_TOKENS, block))
        while engine.has_work:
            started = time.perf_counter()
            engine.step()
            steps.append((time.perf_counter() - started, engine.loads()["check"].running))
        return _means(watch.steps, steps, sequences)

    def prefill(self) -> float:
        """Seconds of a long prompt alone, its first token included."""
        engine = self._wiring.engine(Watch(), seed=0)
        engine.submit(self._request(0, PREFILL_TOKENS, 1, 0))
        started = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - started

    def _request(self, index: int, prompt: int, output: int, block: int) -> Request:
        start = index * _SPAN
        return Request(
            str(index),
            "check",
            tuple(self._tokens[start : start + prompt]),
            SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
            SpeculationParams(enabled=block > 0, max_draft_tokens=block or None),
        )


def _means(stats: Sequence[StepStats], steps: Sequence[tuple[float, int]], sequences: int) -> Measured:
    """Over the steps that only decode, with every sequence still there afterwards and, if any drafts, all drafting.

    The first of them is left out: its draft reads the prompt.
    """
    kept = [
        (told, seconds)
        for told, (seconds, running) in zip(stats, steps, strict=True)
        if not told.prompt_tokens and running == sequences
    ][1:]
    drafted = [block for told, _ in kept for block in told.drafted_per_block]
    accepted = [block for told, _ in kept for block in told.accepted_per_block]
    examined = sum(min(a + 1, d) for a, d in zip(accepted, drafted, strict=True))
    tokens = sum(told.generated_tokens for told, _ in kept)
    phases = [told.phase_seconds for told, _ in kept]
    return Measured(
        step_s=statistics.median(seconds for _, seconds in kept),
        around_s=statistics.median(
            seconds - p["forward"] - p["draft"] for (_, seconds), p in zip(kept, phases, strict=True)
        ),
        draft_s=statistics.median(p["draft"] for p in phases),
        context=PROMPT_TOKENS + tokens / sequences / 2,
        alpha=sum(accepted) / examined if examined else 0.0,
        tokens=tokens / sequences / len(kept),
    )


def run_round(bench: Bench, threads: int) -> list[dict[str, Any]]:
    """Every case once, between two measurements of the machine, whose mean predicts: milliseconds."""
    before = measure(bench.target.config, "int8", 0.0, threads)
    found = {(n, block): bench.decode(n, block) for block in BLOCKS for n in BATCHES}
    prefill = bench.prefill()
    after = measure(bench.target.config, "int8", 0.0, threads)
    rates = Rates(*((getattr(before, name) + getattr(after, name)) / 2 for name in Rates.__slots__))
    machine = rates.machine(float(psutil.virtual_memory().total), CPU_OVERHEADS)
    predicted = prefill_seconds(machine, bench.target, PREFILL_TOKENS, bench.chunk)
    return [
        {"case": "rates", **{name: getattr(rates, name) for name in Rates.__slots__}},
        *(_entry(bench, machine, n, block, one) for (n, block), one in found.items()),
        {
            "case": "prefill",
            "tokens": PREFILL_TOKENS,
            "predicted_ms": predicted * 1e3,
            "measured_ms": prefill * 1e3,
        },
    ]


def _entry(bench: Bench, machine: Machine, sequences: int, block: int, found: Measured) -> dict[str, Any]:
    draft = Draft("draft", bench.draft, found.alpha, block) if block else None
    forwards = 0.0 if draft is None else draft_seconds(machine, draft, sequences, found.context, block)
    return {
        "case": f"{sequences} x {block + 1}",
        "sequences": sequences,
        "draft_tokens": block,
        "predicted_ms": step(machine, bench.target, sequences, found.context, draft, block).seconds * 1e3,
        "measured_ms": found.step_s * 1e3,
        "around_ms": found.around_s * 1e3,
        "around_predicted_ms": CPU_OVERHEADS.around(sequences, sequences * (block + 1)) * 1e3,
        "draft_ms": found.draft_s * 1e3,
        "draft_forwards_predicted_ms": forwards * 1e3,
        "alpha": found.alpha,
        "tau": found.tokens,
        "tau_predicted": tau(found.alpha, block),
    }


def combine(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the rounds, by case; a ratio is the median of the rounds' ratios."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in (entry for one in rounds for entry in one):
        timed = "predicted_ms" in entry
        ratio = {"ratio": entry["predicted_ms"] / entry["measured_ms"]} if timed else {}
        for key, value in {**entry, **ratio}.items():
            if key != "case":
                values[entry["case"]][key].append(value)
    medians = {case: {k: statistics.median(v) for k, v in keys.items()} for case, keys in values.items()}
    return [{"case": case, **keys} for case, keys in medians.items()]


def show(entries: Sequence[dict[str, Any]]) -> None:
    """One line per case."""
    for entry in entries:
        if entry["case"] == "rates":
            rates = {name: f"{entry[name] / 1e9:.1f}" for name in Rates.__slots__[:-2]}
            say(f"rates, 10^9 per second: {rates}, overlap {entry['overlap']:g}")
            continue
        line = f"{entry['case']:>8}  predicted {entry['predicted_ms']:8.2f} ms  measured {entry['measured_ms']:8.2f} ms"
        line += f"  ratio {entry['ratio']:.2f}"
        if "around_ms" in entry:
            line += f"  around {entry['around_ms']:5.2f} ms ({entry['around_predicted_ms']:.2f})"
        if entry.get("draft_tokens"):
            line += f"  drafting {entry['draft_ms']:5.2f} ms ({entry['draft_forwards_predicted_ms']:.2f} of forwards)"
            line += f"  alpha {entry['alpha']:.2f} tau {entry['tau']:.2f} ({entry['tau_predicted']:.2f})"
        say(line)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=MODEL, help=f"default: {MODEL}")
    parser.add_argument("--draft", default=DRAFT, help=f"default: {DRAFT}")
    parser.add_argument("--threads", type=int, default=None, help="default: the physical cores")
    parser.add_argument("--rounds", type=int, default=5, help="medians are shown")
    parser.add_argument("--quick", action="store_true", help="one round only")
    parser.add_argument("--out", type=Path, help=f"result file; default: {RESULTS}/DATE-plan-check.json")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the check; returns the exit code."""
    chosen = _arguments(argv)
    rounds = 1 if chosen.quick else chosen.rounds
    busy = psutil.cpu_percent(interval=1.0) / 100
    try:
        bench = Bench(chosen.model, chosen.draft, chosen.threads)
    except UserError as error:
        sys.stderr.write(f"check: {error}\n")
        return error.exit_code
    bench.decode(1, 0)  # warms everything up
    entries = combine([run_round(bench, bench.pool.threads) for _ in range(rounds)])
    show(entries)
    record = described(
        "plan_check", bench.pool, rounds, model=chosen.model, draft=chosen.draft, entries=entries
    )
    record["machine"] |= {"busy_share": round(busy, 3)}
    store(record, chosen.out, chosen.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
