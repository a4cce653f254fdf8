"""Configuration -> engine: resolves references, loads weights, sizes the KV arena, wires the served models."""

import filecmp
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from paceline.kernels.cpu.library import Pool
from paceline.kernels.formats import LANES
from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig
from paceline.server.decoding.policy import AdaptivePolicy, FixedPolicy, Policy
from paceline.server.engine.cpu_runner import CpuRunner
from paceline.server.engine.engine import Engine
from paceline.server.engine.interface import EngineObserver, ModelInfo, Tokenizer
from paceline.server.engine.kv_arena import KvArena, MemberShape, bytes_per_token
from paceline.server.engine.kv_blocks import KvBlocks
from paceline.server.engine.native import BuiltEngine, NativeEngine
from paceline.server.engine.proposers import DraftModelProposer, NgramProposer, Proposer
from paceline.server.engine.runner import Runner, TorchRunner
from paceline.server.engine.scheduler import Scheduler
from paceline.server.engine.served import ServedModel
from paceline.server.errors import ConfigError
from paceline.server.models.llama import Decoder
from paceline.server.models.loader import LoadedModel, ModelLoader, kernels_wanted
from paceline.server.models.manifest import check_tokenizer, read_manifest
from paceline.server.models.sources import resolve
from paceline.server.models.tokenizer import load_tokenizer

_log = logging.getLogger(__name__)
#: "auto" KV budget: room for this many full contexts of every model, at most a quarter of the free memory.
_AUTO_CONTEXTS = 4
_AUTO_MEMORY_SHARE = 0.25
_T = TypeVar("_T")


def build_engine(config: PacelineConfig, observer: EngineObserver) -> NativeEngine:
    """An engine that loads when started; ``config`` must be resolved (device and threads not "auto")."""
    return NativeEngine(
        lambda: build_native(config, observer), max_queued_requests=config.server.max_queued_requests
    )


@dataclass(frozen=True)
class Parts:
    """One served model's loaded pieces; ``target`` is what is served."""

    spec: ModelSpec
    tokenizer: Tokenizer
    target: LoadedModel
    draft: LoadedModel | None

    @property
    def members(self) -> list[LoadedModel]:
        return [self.target] if self.draft is None else [self.target, self.draft]


@dataclass(frozen=True)
class Wiring:
    """Served models over one KV arena, ready to be stepped; every engine made of it starts with an empty cache."""

    served: Mapping[str, ServedModel]
    num_blocks: int
    config: EngineConfig

    def engine(self, observer: EngineObserver, *, seed: int) -> Engine:
        """An engine over the wired models; one at a time, as they share the KV memory.

        Args:
            seed: of the generator for unseeded sampling.
        """
        blocks = KvBlocks(self.num_blocks, prefix_caching=self.config.prefix_caching)
        scheduler = Scheduler(
            self.served,
            blocks,
            max_batch_tokens=self.config.max_batch_tokens,
            max_running=self.config.max_running,
        )
        return Engine(self.served, blocks, scheduler, observer, seed=seed)


def build_native(config: PacelineConfig, observer: EngineObserver) -> BuiltEngine:
    """Load everything and wire it; blocks for as long as that takes.

    Raises:
        UserError: a model that cannot be found or loaded, a draft that does not fit, too little memory for KV.
    """
    loader = make_loader(config.engine)
    wiring = wire([load_parts(spec, loader) for spec in config.models], config.engine, loader)
    engine = wiring.engine(observer, seed=int.from_bytes(os.urandom(7), "big"))
    return BuiltEngine(engine, {name: model.info for name, model in wiring.served.items()})


def make_loader(engine: EngineConfig) -> ModelLoader:
    """A loader for the device, with the threads that its models will run on; ``engine`` must be resolved.

    Raises:
        ConfigError: a block size that the CPU kernels cannot use.
    """
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    pool = Pool(engine.threads or 1) if kernels_wanted(engine.device) else None
    if pool is not None:  # one thread pool at work at a time: torch's own would spin beside the kernels'
        torch.set_num_threads(1)
        if engine.block_size % LANES:
            raise ConfigError(
                f"engine.block_size: the CPU kernels need a multiple of {LANES}, not {engine.block_size}"
            )
    return ModelLoader(torch.device(engine.device), pool)


def wire(parts: Sequence[Parts], engine: EngineConfig, loader: ModelLoader) -> Wiring:
    """Put models over one KV arena.

    Args:
        parts: everything that is served; what they share is wired once.
        loader: that loaded them.
    """
    members = {m.key: m for p in parts for m in p.members}
    shapes = {key: MemberShape(key, m.config, m.kv_dtype) for key, m in members.items()}
    arena = KvArena(
        list(shapes.values()),
        block_size=engine.block_size,
        total_bytes=_kv_bytes(engine, list(shapes.values()), loader.device),
        device=loader.device,
    )
    runners = {key: make_runner(m, shapes[key], arena, loader.pool) for key, m in members.items()}
    served = {p.spec.name: _serve(p, runners, engine) for p in parts}
    return Wiring(served, arena.num_blocks, engine)


def make_runner(member: LoadedModel, shape: MemberShape, arena: KvArena, pool: Pool | None) -> Runner:
    """What runs a member over its part of an arena; ``pool`` is that of the loader that loaded it."""
    layout = arena.layout(shape)
    if isinstance(member.weights, Decoder):
        return TorchRunner(member.weights, layout, arena.views(shape))
    assert pool is not None
    return CpuRunner(member.weights, pool, layout, arena.buffer, member.kv_dtype)


def load_parts(spec: ModelSpec, loader: ModelLoader) -> Parts:
    """Load what a served model consists of.

    Raises:
        UserError: a model that cannot be found or loaded, or a draft that does not fit.
    """
    path = resolve(spec.target)
    tokenizer = _timed(f"tokenizer of {spec.name}", lambda: load_tokenizer(path))
    target = _timed(f"weights of {spec.name} ({spec.weights})", lambda: loader.load(path, spec.weights))
    if target.config.head_rows != target.config.vocab_size:
        raise ConfigError(
            f"{path} knows {target.config.head_rows} of {target.config.vocab_size} ids, so that it can only draft: "
            "serve its target and name it with --draft"
        )
    return Parts(spec, tokenizer, target, load_draft(spec, path, tokenizer, loader))


def load_draft(
    spec: ModelSpec, target: Path, tokenizer: Tokenizer, loader: ModelLoader, *, fleeting: bool = False
) -> LoadedModel | None:
    """Load the draft model that ``spec`` names, if it names one, and see that it fits the target.

    Args:
        target: path of the target; ``tokenizer`` is its own.
        fleeting: see ``ModelLoader.load``.

    Raises:
        UserError: it cannot be found or loaded, or does not fit.
    """
    reference = spec.speculation.draft
    if reference is None or reference == "ngram":
        return None
    path = resolve(reference)
    manifest = read_manifest(path)
    if manifest is not None:
        check_tokenizer(tokenizer.sha256, manifest.base.tokenizer_sha256)
    if not _same_tokenizer_files(path, target):
        check_tokenizer(tokenizer.sha256, load_tokenizer(path).sha256)
    return _timed(
        f"draft of {spec.name}",
        lambda: loader.load(path, spec.weights, target=target, fleeting=fleeting),
    )


def _same_tokenizer_files(path: Path, other: Path) -> bool:
    """Whether two folders hold copies of one tokenizer, which spares loading it a second time."""
    names = ("tokenizer.json", "tokenizer_config.json")
    pairs = [(path / name, other / name) for name in names]
    return all(a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False) for a, b in pairs)


def _serve(parts: Parts, runners: Mapping[str, Runner], engine: EngineConfig) -> ServedModel:
    spec, target = parts.spec, parts.target
    proposers: dict[str, Proposer] = {}
    default = spec.speculation.draft
    if parts.draft is not None:
        default = _draft_name(parts.draft.path)
        proposers[default] = DraftModelProposer(
            runners[parts.draft.key],
            vocab_size=target.config.vocab_size,
            max_batch_tokens=engine.max_batch_tokens,
            num_proposable=parts.draft.config.head_rows,
        )
    if spec.speculation.ngram or default == "ngram":
        proposers["ngram"] = NgramProposer()
    info = ModelInfo(
        name=spec.name,
        created=int(time.time()),
        context_length=_context_length(parts),
        vocab_size=target.config.vocab_size,
        tokenizer=parts.tokenizer,
        drafts=tuple(proposers),
        default_draft=default,
        max_draft_tokens=spec.speculation.max_draft_tokens,
        min_lenience=spec.speculation.min_lenience,
        system_fingerprint=_fingerprint(target.key),
    )
    policy: Policy = AdaptivePolicy() if spec.speculation.policy == "adaptive" else FixedPolicy()
    return ServedModel(
        info,
        runners[target.key],
        proposers,
        policy,
        spec.speculation.verify,
        spec.speculation.lenience_form,
    )


def _context_length(parts: Parts) -> int:
    """The configured length, at most what every member was made for."""
    limit = min(m.config.context_length for m in parts.members)
    wanted = parts.spec.context_length
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"context_length {wanted} of model {parts.spec.name!r} is over its limit of {limit}"
        )
    return wanted or limit


def _draft_name(path: Path) -> str:
    return path.stem if path.suffix == ".gguf" else path.name


def _fingerprint(key: str) -> str:
    return "fp_" + hashlib.sha256(f"native/{key}".encode()).hexdigest()[:12]


def _kv_bytes(engine: EngineConfig, members: list[MemberShape], device: torch.device) -> int:
    if engine.kv_cache_gib is not None:
        return int(engine.kv_cache_gib * 2**30)
    wanted = sum(
        _AUTO_CONTEXTS * m.config.context_length * bytes_per_token(m.config, m.dtype) for m in members
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return min(wanted, int(free * _AUTO_MEMORY_SHARE))


def _timed(what: str, load: Callable[[], _T]) -> _T:
    started = time.monotonic()
    result = load()
    _log.info("loaded %s in %.1f s", what, time.monotonic() - started)
    return result
