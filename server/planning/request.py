"""From what the command was told to a plan: which model, on what, under which assumptions.

Every option is used or refused. Owns where each number comes from (data sheet, this machine, the user, an assumption);
knows no formulas.
"""

from dataclasses import dataclass

from paceline.server.config.schema import EngineConfig
from paceline.server.errors import ConfigError
from paceline.server.planning import assumptions as known
from paceline.server.planning.assumptions import Assumption
from paceline.server.planning.footprint import Footprint, Weights, footprint
from paceline.server.planning.hardware import on_cpu, on_gpus
from paceline.server.planning.inputs import NGRAM, ModelFacts, acceptance, read_model
from paceline.server.planning.options import Options, check_options
from paceline.server.planning.plan import Ask, Plan, make_plan
from paceline.server.planning.speculation import Draft
from paceline.server.planning.traffic import Goals, Requests


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan with the names and sources of what went into it.

    Attributes:
        replicas_given: how many the named devices make; more may be needed.
    """

    model: str
    device: str
    replicas_given: int
    plan: Plan
    assumptions: tuple[Assumption, ...]


def prepare(options: Options) -> Prepared:
    """Read, measure where that was asked for, and plan.

    Raises:
        UserError: one line that names the option at fault.
    """
    check_options(options)
    facts = read_model(options.model)
    if facts.config.reads_state or facts.config.head_rows != facts.config.vocab_size:
        raise ConfigError(f"--model: {facts.name} can only draft; plan its target and name it with --draft")
    drafting = _read_draft(options)
    weights: Weights = options.weights or facts.weights or ("int8" if options.on_cpu else "bf16")
    sparsity = facts.sparsity if options.sparsity is None else options.sparsity
    keeps_states = drafting is not None and drafting.facts is not None and drafting.facts.config.reads_state
    target = footprint(
        facts.config, weights, sparsity=sparsity, keeps_states=keeps_states, shares_head=not options.on_cpu
    )
    hardware = on_cpu(options, target) if options.on_cpu else on_gpus(options, target)
    draft = None if drafting is None else _draft(options, drafting, target)
    plan = make_plan(hardware.machine, target, draft, _ask(options, facts))
    notes = [
        *hardware.assumptions,
        Assumption(
            "utilization",
            f"{options.utilization:g} at most",
            _given(options.utilization, known.UTILIZATION_SOURCE),
        ),
        *([] if drafting is None else [Assumption("acceptance", f"{drafting.alpha:g}", drafting.source)]),
        *_format_notes(target, options),
    ]
    return Prepared(facts.name, hardware.name, hardware.replicas, plan, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Drafting:
    """What was asked to draft; ``facts`` None is n-grams."""

    name: str
    facts: ModelFacts | None
    alpha: float
    source: str


def _read_draft(options: Options) -> _Drafting | None:
    if options.draft is None:
        return None
    given = "given with --alpha"
    if options.draft == NGRAM:
        if options.alpha is None:
            raise ConfigError("--draft ngram: how often n-grams are right depends on the text; give --alpha")
        return _Drafting(NGRAM, None, options.alpha, given)
    facts = read_model(options.draft)
    if options.alpha is not None:
        return _Drafting(facts.name, facts, options.alpha, given)
    found = acceptance(facts)
    return _Drafting(facts.name, facts, found.alpha, found.source)


def _draft(options: Options, drafting: _Drafting, target: Footprint) -> Draft:
    """A draft runs in its own format, else in the target's; beside an int4 target in bf16."""
    facts = drafting.facts
    if facts is None:
        return Draft(drafting.name, None, drafting.alpha, options.draft_tokens)
    if facts.config.vocab_size != target.config.vocab_size:
        raise ConfigError(
            f"--draft: {facts.name} has a vocabulary of {facts.config.vocab_size} ids, the model one of "
            f"{target.config.vocab_size}; a draft must have its target's"
        )
    if facts.config.reads_state and facts.config.hidden_size != target.config.hidden_size:
        raise ConfigError(
            f"--draft: {facts.name} reads states of width {facts.config.hidden_size}, but the model's have "
            f"{target.config.hidden_size}; use it with the target it was made for"
        )
    fallback: Weights = "bf16" if target.weights == "int4" else target.weights
    model = footprint(
        facts.config, facts.weights or fallback, sparsity=facts.sparsity, shares_head=not options.on_cpu
    )
    return Draft(drafting.name, model, drafting.alpha, options.draft_tokens)


def _ask(options: Options, facts: ModelFacts) -> Ask:
    return Ask(
        requests=Requests(options.qps, options.prompt_tokens, options.output_tokens),
        context_tokens=options.context_tokens or facts.config.context_length,
        goals=Goals(_seconds(options.ttft_ms), _seconds(options.itl_ms)),
        max_running=_max_running(options),
        chunk_tokens=EngineConfig.max_batch_tokens,
        utilization=options.utilization,
    )


def _max_running(options: Options) -> int | None:
    """``paceline serve``'s default on a CPU; on GPUs, where it depends on the engine, as many as fit."""
    return EngineConfig.max_running if options.on_cpu and options.max_running is None else options.max_running


def _format_notes(target: Footprint, options: Options) -> list[Assumption]:
    if target.weights == "int4":
        return [
            Assumption(
                "int4",
                "a 16-bit scale per 128 weights, head bf16",
                "as GPTQ and AWQ; Paceline serves none yet",
            )
        ]
    if target.weights == "int8" and not options.on_cpu:
        return [
            Assumption("int8", "bytes of the CPU kernels' format", "Paceline serves dense int8 on CPUs only")
        ]
    return []


def _given(value: float, source: str) -> str:
    return source if value == known.UTILIZATION else "given"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
