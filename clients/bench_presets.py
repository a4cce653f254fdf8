"""What a run of the side-by-side bench compares: presets by name, and the plan that they and the flags make.

Owns the presets and how flags override them; it must not start anything. A preset fixes what would otherwise have to
be repeated on every command line: the model, its draft, streams per scenario and how contenders share the memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paceline.clients.bench_scenarios import CODE_PROMPTS, SCENARIO_NAMES, Scenario, ScenarioName
from paceline.clients.traffic import ClosedLoop
from paceline.clients.workload import BUILT_IN, Prompt, UsageError

Peer = Literal["llama.cpp", "vllm", "transformers"]
PEERS: tuple[Peer, ...] = ("llama.cpp", "vllm", "transformers")


@dataclass(frozen=True, slots=True)
class Preset:
    """A comparison by name.

    Attributes:
        draft: model reference of the draft, or None.
        streams: streams at once, by scenario.
        requests_per_stream: 2 keeps a level from being all ramp-up; 1 halves the time.
        llamacpp_q8_0: whether llama.cpp also runs the model requantized to Q8_0.
        transformers_dtypes: what transformers runs in.
        restart: start contenders for each turn and end them after it, for models of which only one fits in memory;
            otherwise all are started once and paused between their turns.
        prompts: of the short scenario.
    """

    model: str
    draft: str | None
    streams: Mapping[ScenarioName, tuple[int, ...]]
    requests_per_stream: int
    llamacpp_q8_0: bool
    transformers_dtypes: tuple[str, ...]
    restart: bool
    prompts: Sequence[Prompt]


PRESETS: Mapping[str, Preset] = {
    "smollm2": Preset(
        model="smollm2-135m-instruct",
        draft=None,
        streams={"short": (1, 4, 16), "long": (1, 4, 16)},
        requests_per_stream=2,
        llamacpp_q8_0=True,
        transformers_dtypes=("bf16", "fp32"),
        restart=False,
        prompts=BUILT_IN,
    ),
    # Prefill of a 1.5B model at 16 x 1,000 tokens takes llama.cpp six minutes on two cores: long is one stream only,
    # unless --concurrency asks for more.
    "qwen-pair": Preset(
        model="qwen2.5-coder-1.5b-instruct",
        draft="qwen2.5-coder-0.5b-instruct",
        streams={"short": (1, 4, 16), "long": (1,)},
        requests_per_stream=1,
        llamacpp_q8_0=False,
        transformers_dtypes=("bf16",),
        restart=True,
        prompts=CODE_PROMPTS,
    ),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A validated run.

    Attributes:
        preset: its name, for the report and the name of the result file.
        serve: `paceline serve` options of each server of ours.
        gguf: for llama.cpp, if ``model`` is no GGUF file.
        requests: per level at least.
        temperature: of every request; 0 is greedy.
        vllm_python: interpreter of the environment that vLLM is installed in; None means it is not given.
    """

    preset: str
    model: str
    draft: str | None
    serve: Sequence[Sequence[str]]
    scenarios: Sequence[Scenario]
    rounds: int
    max_tokens: int
    requests: int
    requests_per_stream: int
    prompts: Sequence[Prompt]
    peers: Sequence[Peer] = PEERS
    gguf: Path | None = None
    vllm_python: Path | None = None
    llamacpp_q8_0: bool = True
    transformers_dtypes: Sequence[str] = ("bf16", "fp32")
    restart: bool = False
    temperature: float = 0.0

    def count(self, level: ClosedLoop) -> int:
        """Requests of one level."""
        return max(self.requests, self.requests_per_stream * level.concurrency)

    @property
    def slots(self) -> int:
        """Most streams at once."""
        return max(level.concurrency for scenario in self.scenarios for level in scenario.levels)


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"--preset {name!r}: there are {', '.join(PRESETS)}")
    return PRESETS[name]


def scenarios(preset: Preset, names: str | None, levels: Sequence[ClosedLoop] | None) -> tuple[Scenario, ...]:
    """The preset's scenarios, fewer if ``names`` lists them, with other streams if ``levels`` are given.

    Raises:
        UsageError: an unknown scenario.
    """
    wanted = names.split(",") if names else SCENARIO_NAMES
    unknown = [name for name in wanted if name not in SCENARIO_NAMES]
    if unknown:
        raise UsageError(f"--scenario {unknown[0]!r}: there are {', '.join(SCENARIO_NAMES)}")
    return tuple(
        Scenario(name, tuple(levels or (ClosedLoop(n) for n in preset.streams[name])))
        for name in SCENARIO_NAMES
        if name in wanted
    )


def peers(text: str | None) -> tuple[Peer, ...]:
    """Peers of a comma-separated list; all without one, none for ``"none"``.

    Raises:
        UsageError: an unknown peer.
    """
    wanted = text.split(",") if text is not None else list(PEERS)
    if wanted == ["none"]:
        return ()
    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        raise UsageError(f"--peers {unknown[0]!r}: there are {', '.join(PEERS)}, or none")
    return tuple(peer for peer in PEERS if peer in wanted)


def serve_options(draft: str | None) -> list[list[str]]:
    """Our servers by default: int8 alone, with n-grams, and with the draft, or the one that comes along."""
    return [["--weights", "int8", "--draft", kind] for kind in ("none", "ngram", draft or "auto")]
