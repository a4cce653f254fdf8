"""The configuration's shape: every key with its type, default, range and help, in one place.

The dataclasses are what the rest of the server reads; ``keys()`` is the same information as a flat table that
drives the file reader, the environment reader and the command line. A key that is added to a dataclass is
therefore a file key, an environment variable and a flag at once.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from keyword import iskeyword
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from paceline.server.decoding.policy import MAX_DRAFT_TOKENS

Section = Literal["server", "engine", "model", "speculation"]
Kind = Literal["text", "texts", "int", "float", "floats", "bool", "choice"]

#: Draft that is looked for among those that come with Paceline, by the target's weights.
AUTO_DRAFT = "auto"
#: Draft that is the expert of a steered model's first pair that has one.
EXPERT_DRAFT = "expert"
_LATER = "is not available in this version"


def key_field(help: str, default: Any = MISSING, *, secret: bool = False, **about: Any) -> Any:
    """A dataclass field that carries what ``Key`` needs beyond its name and type."""
    return field(default=default, repr=not secret, metadata={"help": help, "secret": secret, **about})


@dataclass(frozen=True)
class ServerConfig:
    """The ``[server]`` table: where to listen, whom to serve, how to stop."""

    host: str = key_field("Address to listen on.", "127.0.0.1")
    port: int = key_field("Port to listen on; 0 takes a free one.", 8000, low=0, high=65535)
    api_keys: tuple[str, ...] = key_field(
        "Key that clients must send; may be repeated. PACELINE_API_KEY sets one, too.",
        (),
        flag="--api-key",
        secret=True,
    )
    admin_keys: tuple[str, ...] = key_field(
        "Key for the admin endpoints; may be repeated.", (), flag="--admin-key", secret=True
    )
    max_queued_requests: int = key_field("Waiting requests before new ones get 429.", 256, low=1)
    drain_seconds: float = key_field("How long running requests may finish when asked to stop.", 30.0, low=0)
    log_format: Literal["text", "json"] = key_field("How log lines look.", "text")
    allow_unknown_fields: bool = key_field("Ignore unknown request fields with a warning, not a 400.", False)


@dataclass(frozen=True)
class EngineConfig:
    """The ``[engine]`` table. None is "auto": ``resolve`` fills threads, the engine kv_cache_gib."""

    kind: Literal["native", "vllm"] = key_field(
        "Which engine runs the models.",
        "native",
        flag="--engine",
    )
    device: Literal["auto", "cpu", "cuda"] = key_field(
        "Where to run; auto takes CUDA if there is one.", "auto"
    )
    threads: int | None = key_field("CPU threads; auto takes the physical cores.", None, low=1, high=1024)
    kv_cache_gib: float | None = key_field("Memory for the KV cache of all models, GiB.", None, above=0)
    max_batch_tokens: int = key_field("Prefill tokens per engine step.", 512, low=1)
    max_running: int = key_field("Sequences that run at the same time.", 64, low=1)
    block_size: int = key_field("Tokens per KV block.", 16, low=1, high=1024)
    prefix_caching: bool = key_field("Reuse the KV cache of equal prompt beginnings.", True)
    #: Arguments of vLLM's engine, from ``[engine.vllm]`` and from the keys above (``config.vllm``).
    vllm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeculationConfig:
    """The ``[models.speculation]`` table; ``draft`` None switches speculation off unless a request asks."""

    draft: str | None = key_field(
        'Draft model reference, "ngram", "expert" (of a steered model) or "none"; auto is the one that comes with '
        "Paceline for the target, if any.",
        AUTO_DRAFT,
        none_word="none",
    )
    max_draft_tokens: int = key_field("Draft tokens per block.", 4, low=1, high=MAX_DRAFT_TOKENS)
    policy: Literal["adaptive", "fixed"] = key_field(
        "How the draft length is chosen: adaptive drafts up to max_draft_tokens as far as it pays, fixed always them.",
        "adaptive",
    )
    draft_schedule: tuple[str, ...] = key_field(
        'vLLM only: draft tokens by how many sequences run: "4:3", "16:1", "0" drafts 3 up to 4, 1 up to 16, 0 beyond.',
        (),
    )
    ngram: bool = key_field(
        "Let requests, and the adaptive policy, use n-gram proposals beside the draft.", True
    )
    verify: Literal["block", "token"] = key_field("Verification rule for unseeded sampling.", "block")
    min_lenience: float = key_field(
        "Least lenience that requests may ask for; 1 is exact.", 1.0, above=0, high=1
    )
    lenience_form: Literal["exp", "lin", "sq"] = key_field(
        "What lenience e makes of a probability p: exp p^e, lin p/e, sq p/e^2.", "exp"
    )


@dataclass(frozen=True)
class SteeringConfig:
    """One ``[[models.steering]]`` table: a pair of models whose difference steers the target.

    With s_M, s_E, s_A the logits of target, expert and anti-expert: proxy is s_M + alpha (s_E - s_A), amplify is
    s_E + beta (s_M - s_A), cfg is s_M + alpha (s_M - s_A).
    """

    name: str = key_field("What requests call the pair.")
    anti_expert: str = key_field('Untuned model reference, or "self": the target, mostly under anti_prompt.')
    mode: Literal["proxy", "amplify", "cfg"] = key_field("How the pair's logits are used.", "proxy")
    expert: str | None = key_field("Tuned model reference; modes proxy and amplify.", None, none_word="none")
    alpha: float | None = key_field("Strength of proxy and cfg; auto is 1.", None)
    beta: float | None = key_field("Strength of amplify; auto is 1.", None)
    limits: tuple[float, float] = key_field("Least and greatest strength of requests.", (0.0, 4.0))
    expert_template: str | None = key_field(
        'Chat template of the expert: target, that is the prompt of the target; "own", or a Jinja file.',
        None,
        none_word="target",
    )
    anti_template: str | None = key_field(
        'Chat template of the anti-expert: target, "own" or a Jinja file.', None, none_word="target"
    )
    response_prefix: str | None = key_field(
        "Text that the expert finds at the start of its answer.", None, none_word="none"
    )
    anti_prompt: str | None = key_field(
        "What the anti-expert reads instead: of a conversation's system message, or of a completion's prompt. Empty: "
        "no system message, or only the last token of the prompt.",
        None,
        none_word="none",
        may_be_empty=True,
    )
    support: Literal["full", "top_p", "expert_top_p"] = key_field(
        "Tokens that may come out: all, the nucleus of the combined distribution, or that of the expert.",
        "full",
    )
    support_top_p: float = key_field("Mass of that nucleus.", 0.95, above=0, high=1)


@dataclass(frozen=True)
class ModelSpec:
    """One ``[[models]]`` table: ``name`` is what clients ask for, ``target`` the reference it loads."""

    name: str = key_field("Name that clients ask for; by default taken from the target.")
    target: str = key_field("Catalog name, hf:ORG/NAME[@REV], folder or .gguf file.", flag="MODEL")
    weights: Literal["auto", "fp32", "bf16", "int8"] = key_field(
        "Weight format; auto takes the fastest that is as good as fp32 for this model.",
        "auto",
        refused={"int4": f'{_LATER}; use "auto", "fp32", "bf16" or "int8"'},
    )
    context_length: int | None = key_field("Longest sequence, tokens; auto is the model's own.", None, low=2)
    speculation: SpeculationConfig = SpeculationConfig()
    steering: tuple[SteeringConfig, ...] = ()


@dataclass(frozen=True)
class PacelineConfig:
    """Everything ``serve`` needs."""

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    models: tuple[ModelSpec, ...] = ()


SECTIONS: Mapping[Section, type] = {
    "server": ServerConfig,
    "engine": EngineConfig,
    "model": ModelSpec,
    "speculation": SpeculationConfig,
}


@dataclass(frozen=True)
class Key:
    """One configuration key, as file, environment and command line see it.

    Attributes:
        none_word: the word that stands for None ("auto", "none"), if None is allowed.
        low, high: inclusive bounds. ``above``: exclusive lower bound.
        refused: words of the contract that this version answers with a sentence of its own.
        may_be_empty: whether a text may be empty.
        flag: ``--name``, or the metavariable of the positional argument.
    """

    section: str
    name: str
    kind: Kind
    help: str
    default: Any
    flag: str
    choices: tuple[str, ...] = ()
    none_word: str | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    secret: bool = False
    may_be_empty: bool = False

    @property
    def param(self) -> str:
        """Name under which the command line passes the value; Python's own words get a line behind them."""
        name = self.flag.lstrip("-").replace("-", "_").lower()
        return f"{name}_" if iskeyword(name) else name

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return f"PACELINE_{self.section}_{self.name}".upper()


@cache
def keys() -> tuple[Key, ...]:
    """Every key of every section, in the order of the dataclasses."""
    return tuple(key for section in SECTIONS for key in section_keys(section).values())


@cache
def section_keys(section: Section) -> Mapping[str, Key]:
    """Keys of one table by name; nested tables are not keys."""
    return keys_of(section, SECTIONS[section])


def keys_of(section: str, table: type) -> Mapping[str, Key]:
    """Keys of a dataclass whose fields are made with ``key_field``, by name; other fields are not keys."""
    hints = get_type_hints(table)
    return {
        entry.name: _describe(section, entry.name, hints[entry.name], entry.default, dict(entry.metadata))
        for entry in fields(table)
        if entry.metadata
    }


def _describe(section: str, name: str, hint: Any, default: Any, about: dict[str, Any]) -> Key:
    options = get_args(hint)
    if NoneType in options:
        hint = next(option for option in options if option is not NoneType)
        about.setdefault("none_word", "auto")
    flag = about.pop("flag", f"--{name.replace('_', '-')}")
    choices = _choices(hint, about.get("refused", {}))
    return Key(section, name, _kind(hint), default=default, flag=flag, choices=choices, **about)


def _choices(hint: Any, refused: Mapping[str, str]) -> tuple[str, ...]:
    words = get_args(hint) if get_origin(hint) is Literal else ()
    return tuple(word for word in words if word not in refused)


def _kind(hint: Any) -> Kind:
    if get_origin(hint) is Literal:
        return "choice"
    kinds: Mapping[Any, Kind] = {
        str: "text",
        tuple[str, ...]: "texts",
        int: "int",
        float: "float",
        tuple[float, float]: "floats",
        bool: "bool",
    }
    return kinds[hint]
