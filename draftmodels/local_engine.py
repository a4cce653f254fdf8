"""The serving engine in this process, on the caller's thread: what writes training text and measures drafts.

Nothing is modelled after it, it is the engine itself: loader, kernels, scheduler, verification. Every call steps a new
engine with an empty cache over the same weights, so that its result is a function of its arguments alone, and the
target stays loaded when the draft is swapped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from paceline.draftmodels.acceptance import Acceptance, BlockCounter
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.stepping import Progress, make_requests, run, sequences, torch_threads
from paceline.draftmodels.targets import target_spec
from paceline.kernels.cpu.library import Pool
from paceline.server.config import EngineConfig, ModelSpec, PacelineConfig, SpeculationConfig, resolve
from paceline.server.decoding.policy import MAX_DRAFT_TOKENS
from paceline.server.decoding.verify import Rule
from paceline.server.engine.build import Wiring, wire
from paceline.server.engine.interface import ModelInfo, Tokenizer
from paceline.server.engine.parts import Parts, load_draft, load_parts, make_loader
from paceline.server.engine.request import SamplingParams, SpeculationParams
from paceline.server.engine.steering_parts import SteeringParts
from paceline.server.errors import ConfigError
from paceline.server.models.config import ModelConfig
from paceline.server.models.loader import LoadedModel

Weights = Literal["auto", "fp32", "bf16", "int8"]

_NAME = "local"
#: The KV cache has room for this many tokens of every stream; longer ones wait for each other.
_TOKENS_PER_STREAM = 512
#: As good as 0: p^e is 1 for every p > 0 in float64, so that every proposed token is accepted.
_TAKES_ALL = 1e-30
#: Draft tokens per block where everything is accepted: eight in nine tokens are then the draft's.
_LENIENT_BLOCK = 8
_NO_DRAFT = SpeculationParams(enabled=False)


class LocalEngine:
    """A target, and the draft of the moment.

    Args:
        target: a model reference, or a model of a configuration file (``targets``), whose steering counts.
        weights: format of the target; "auto" is what the configuration says. A draft runs in it too, or in int8 where
            this is "auto" and the CPU kernels run it, as drafts are served.
        draft: folder of the first draft; see ``use_draft``.
        threads: None takes the physical cores.
        streams: requests that run at the same time.
        device: "auto" takes CUDA if there is one.
        context_length: None is the target's own.
        fleeting: the target is a model in training: it is not packed for later starts.

    Raises:
        UserError: a model that cannot be found or loaded, or a draft that does not fit.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        weights: Weights = "auto",
        draft: Path | None = None,
        threads: int | None = None,
        streams: int = 16,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        context_length: int | None = None,
        fleeting: bool = False,
    ) -> None:
        speculation = SpeculationConfig(
            draft=None,
            policy="fixed",
            ngram=False,
            max_draft_tokens=MAX_DRAFT_TOKENS,
            min_lenience=_TAKES_ALL,
        )
        named = target_spec(str(target))
        spec = replace(
            named,
            name=_NAME,
            weights=named.weights if weights == "auto" else weights,
            context_length=context_length or named.context_length,
            speculation=speculation,
        )
        engine = EngineConfig(device=device, threads=threads, max_running=streams)
        config = resolve(PacelineConfig(engine=engine, models=(spec,)))
        self._engine = config.engine
        with torch_threads(torch.get_num_threads()):  # making a loader changes it
            self._loader = make_loader(config.engine)
            self._target = load_parts(config.models[0], self._loader, fleeting=fleeting)
        self._parts = self._target
        self._wiring: Wiring | None = None
        self._alone: Wiring | None = None
        self.use_draft(draft)

    @property
    def config(self) -> ModelConfig:
        """The target's."""
        return self._target.target.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's."""
        return self._target.tokenizer

    @property
    def target(self) -> LoadedModel:
        """The target's weights."""
        return self._target.target

    @property
    def spec(self) -> ModelSpec:
        """The target as it is configured."""
        return self._target.spec

    @property
    def steering(self) -> SteeringParts | None:
        """What steers the target, if anything does."""
        return self._target.steering

    @property
    def info(self) -> ModelInfo:
        """The target as it is served."""
        return self._ready.served[_NAME].info

    @property
    def draft(self) -> LoadedModel | None:
        """The draft's weights, if there is one."""
        return self._parts.draft

    @property
    def pool(self) -> Pool | None:
        """Threads of the CPU kernels; None where torch runs the models."""
        return self._loader.pool

    @property
    def device(self) -> torch.device:
        """Where the models run."""
        return self._loader.device

    @property
    def streams(self) -> int:
        """Requests that run at the same time."""
        return self._engine.max_running

    @property
    def context_length(self) -> int:
        """Longest sequence, tokens: what target and draft both allow."""
        return self.info.context_length

    def use_draft(self, folder: Path | None) -> None:
        """Serve with another draft, read anew from ``folder``, or with none; the target stays loaded.

        Raises:
            UserError: it cannot be loaded or does not fit; the draft is the old one then.
        """
        parts = self._target
        if folder is not None:
            speculation = replace(parts.spec.speculation, draft=str(folder))
            spec = replace(parts.spec, speculation=speculation)
            with self.exclusive():
                draft = load_draft(spec, parts.target, parts.tokenizer, self._loader, fleeting=True)
            parts = replace(parts, spec=spec, draft=draft)
        if parts is not self._parts:
            self._parts, self._wiring, self._alone = parts, None, None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        steered: bool = True,
        progress: Progress | None = None,
    ) -> list[TokenSequence]:
        """Let the target continue prompts until it ends them.

        Request i has a seed of its own, derived from (``seed``, i): its tokens do not depend on the other prompts, nor
        on how many run together. An end-of-sequence or stop id is part of the answer.

        Args:
            max_tokens: longest answer; an answer is shorter where the context ends.
            stop_token_ids: that end an answer beside the target's own end-of-sequence ids.
            steered: off: by the target alone, as prompts can be continued that its members could not read.
            progress: told (done, total) requests.

        Raises:
            DataError: a prompt leaves no room in the context.
        """
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, stop_token_ids=tuple(stop_token_ids)
        )
        return self._text(self._ready, prompts, sampling, progress, request_seed=seed, steered=steered)

    def generate_from_draft(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        lenient_block: int | None = None,
        progress: Progress | None = None,
    ) -> list[TokenSequence]:
        """On-policy text: let the current draft continue prompts.

        An independent draft is served by itself, with seeds as in ``generate``; its text has only ids that it can
        propose. A draft that reads the target's states exists beside a target only: there speculation runs with a
        lenience of nearly 0, under which everything that the draft proposes is accepted. So the answer's first token
        and the one after every block are the target's, all others the draft's own. That text is a function of all
        arguments and ``streams`` together.

        Args:
            lenient_block: draft tokens per block of the second way. None takes the first way where it can be taken, and
                blocks of 8 where not.

        Raises:
            DataError: a prompt leaves no room in the context.
            ConfigError: there is no draft, or blocks are longer than the engine's limit.
        """
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        if lenient_block is None and not self._parts.reads_states:
            return self._text(self._draft_alone(), prompts, sampling, progress, request_seed=seed)
        wish = self._speculation(lenient_block or _LENIENT_BLOCK, lenience=_TAKES_ALL)
        return self._text(self._ready, prompts, sampling, progress, wish, engine_seed=seed)

    def measure(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_tokens: int,
        draft_tokens: int,
        seed: int = 0,
        rule: Rule = "token",
        progress: Progress | None = None,
    ) -> Acceptance:
        """Serve prompts with the draft and count what is accepted.

        Every block has ``draft_tokens`` tokens, fewer only where the answer ends.

        Args:
            seed: of the random numbers above temperature 0.
            rule: how blocks are verified above temperature 0. Under "token" a position is accepted with probability
                sum_v min(p, q), so that the counts estimate alpha without bias; "block", the server's default, accepts
                more: for tau as it is served.

        Raises:
            DataError: a prompt leaves no room in the context.
            ConfigError: there is no draft, or blocks are longer than the engine's limit.
        """
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        wish, blocks = self._speculation(draft_tokens), BlockCounter(draft_tokens)
        requests = make_requests(self.info, prompts, sampling, wish, None)
        engine = self._ready.with_rule(rule).engine(blocks, seed=seed)
        with self.exclusive():
            return blocks.acceptance(run(engine, requests, progress))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While the CPU kernels work, torch keeps to one thread: two pools would spin against each other."""
        with torch_threads(torch.get_num_threads() if self.pool is None else 1):
            yield

    def close(self) -> None:
        """Let go of weights and KV memory; the engine cannot be used afterwards."""
        del self._wiring, self._alone, self._parts, self._target, self._loader

    @property
    def _ready(self) -> Wiring:
        """Target and draft over KV memory, which is taken at the first call."""
        if self._wiring is None:
            self._wiring = self._wired(self._parts)
        return self._wiring

    def _text(
        self,
        wiring: Wiring,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        progress: Progress | None,
        wish: SpeculationParams = _NO_DRAFT,
        *,
        request_seed: int | None = None,
        engine_seed: int = 0,
        steered: bool = True,
    ) -> list[TokenSequence]:
        info = wiring.served[_NAME].info
        requests = make_requests(info, prompts, sampling, wish, request_seed, steered=steered)
        with self.exclusive():
            commits = run(wiring.engine(BlockCounter(), seed=engine_seed), requests, progress)
        return sequences(requests, commits)

    def _speculation(self, draft_tokens: int, lenience: float = 1.0) -> SpeculationParams:
        if self._parts.draft is None:
            raise ConfigError("there is no draft to generate with or to measure")
        if not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(f"draft tokens per block must be 1 to {MAX_DRAFT_TOKENS}, not {draft_tokens}")
        return SpeculationParams(max_draft_tokens=draft_tokens, lenience=lenience)

    def _wired(self, parts: Parts) -> Wiring:
        """The parts over KV memory for all streams, one full context at the least."""
        context = min(shape.config.context_length for shape, _ in parts.members)
        context = min(context, parts.spec.context_length or context)
        tokens = max(context, self.streams * min(context, _TOKENS_PER_STREAM))
        blocks = tokens + (self.streams + 1) * self._engine.block_size  # a stream's last block is not full
        gib = blocks * parts.kv_bytes_per_token / 2**30
        return wire([parts], replace(self._engine, kv_cache_gib=gib), self._loader)

    def _draft_alone(self) -> Wiring:
        """The draft as the served model."""
        draft = self._parts.draft
        if draft is None:
            raise ConfigError("there is no draft to generate from")
        if self._alone is None:
            spec = replace(self._parts.spec, speculation=self._target.spec.speculation, steering=())
            self._alone = self._wired(Parts(spec, self._target.tokenizer, draft, None))
        return self._alone
