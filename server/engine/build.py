"""Configuration -> engine: resolves references, loads weights, sizes the KV arena, wires the served models."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
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
from paceline.server.engine.examine import Examiner
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


def build_engine(
    config: PacelineConfig, observer: EngineObserver, examiner: Examiner | None = None
) -> NativeEngine:
    """An engine that loads when started; ``config`` must be resolved (device and threads not "auto")."""
    return NativeEngine(
        lambda: build_native(config, observer, examiner),
        max_queued_requests=config.server.max_queued_requests,
    )


@dataclass(frozen=True)
class _Parts:
    """One served model's loaded pieces."""

    spec: ModelSpec
    tokenizer: Tokenizer
    target: LoadedModel
    draft: LoadedModel | None

    @property
    def members(self) -> list[LoadedModel]:
        return [self.target] if self.draft is None else [self.target, self.draft]


def build_native(
    config: PacelineConfig, observer: EngineObserver, examiner: Examiner | None = None
) -> BuiltEngine:
    """Load everything and wire it; blocks for as long as that takes.

    Raises:
        UserError: a model that cannot be found or loaded, a draft that does not fit, too little memory for KV.
    """
    device = torch.device(config.engine.device)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    pool = Pool(config.engine.threads or 1) if kernels_wanted(config.engine.device) else None
    if pool is not None:  # one thread pool at work at a time: torch's own would spin beside the kernels'
        torch.set_num_threads(1)
        if config.engine.block_size % LANES:
            raise ConfigError(
                f"engine.block_size: the CPU kernels need a multiple of {LANES}, not {config.engine.block_size}"
            )
    loader = ModelLoader(device, pool)
    parts = [_load(spec, loader) for spec in config.models]
    members = {m.key: m for p in parts for m in p.members}
    shapes = {key: MemberShape(key, m.config, m.kv_dtype) for key, m in members.items()}
    arena = KvArena(
        list(shapes.values()),
        block_size=config.engine.block_size,
        total_bytes=_kv_bytes(config.engine, list(shapes.values()), device),
        device=device,
    )
    runners = {key: _runner(m, shapes[key], arena, pool) for key, m in members.items()}
    served = {p.spec.name: _serve(p, runners, config.engine) for p in parts}
    blocks = KvBlocks(arena.num_blocks, prefix_caching=config.engine.prefix_caching)
    scheduler = Scheduler(
        served,
        blocks,
        max_batch_tokens=config.engine.max_batch_tokens,
        max_running=config.engine.max_running,
    )
    seed = int.from_bytes(os.urandom(7), "big")
    engine = Engine(served, blocks, scheduler, observer, seed=seed, examiner=examiner)
    return BuiltEngine(engine, {name: model.info for name, model in served.items()})


def _runner(member: LoadedModel, shape: MemberShape, arena: KvArena, pool: Pool | None) -> Runner:
    layout = arena.layout(shape)
    if isinstance(member.weights, Decoder):
        return TorchRunner(member.weights, layout, arena.views(shape))
    assert pool is not None
    return CpuRunner(member.weights, pool, layout, arena.buffer, member.kv_dtype)


def _load(spec: ModelSpec, loader: ModelLoader) -> _Parts:
    path = resolve(spec.target)
    tokenizer = _timed(f"tokenizer of {spec.name}", lambda: load_tokenizer(path))
    target = _timed(f"weights of {spec.name} ({spec.weights})", lambda: loader.load(path, spec.weights))
    if target.config.head_rows != target.config.vocab_size:
        raise ConfigError(
            f"{path} knows {target.config.head_rows} of {target.config.vocab_size} ids, so that it can only draft: "
            "serve its target and name it with --draft"
        )
    return _Parts(spec, tokenizer, target, _load_draft(spec, path, tokenizer, loader))


def _load_draft(
    spec: ModelSpec, target: Path, tokenizer: Tokenizer, loader: ModelLoader
) -> LoadedModel | None:
    reference = spec.speculation.draft
    if reference is None or reference == "ngram":
        return None
    path = resolve(reference)
    manifest = read_manifest(path)
    if manifest is not None:
        check_tokenizer(tokenizer.sha256, manifest.base.tokenizer_sha256)
    check_tokenizer(tokenizer.sha256, load_tokenizer(path).sha256)
    return _timed(f"draft of {spec.name}", lambda: loader.load(path, spec.weights, target=target))


def _serve(parts: _Parts, runners: Mapping[str, Runner], engine: EngineConfig) -> ServedModel:
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
        weights_keys=tuple(member.key for member in parts.members),
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


def _context_length(parts: _Parts) -> int:
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
