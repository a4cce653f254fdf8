"""Configuration -> engine: resolves references, loads weights, sizes the KV arena, wires the served models."""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from paceline.kernels.cpu.library import Pool
from paceline.kernels.dispatch import wanted
from paceline.server.config.schema import EXPERT_DRAFT, EngineConfig, PacelineConfig
from paceline.server.decoding.policy import AdaptivePolicy, FixedPolicy, Policy
from paceline.server.decoding.verify import Rule
from paceline.server.engine.cpu_runner import CpuRunner
from paceline.server.engine.draft_proposer import DraftModelProposer
from paceline.server.engine.engine import Engine
from paceline.server.engine.examine import Examiner
from paceline.server.engine.expert_proposer import ExpertProposer
from paceline.server.engine.interface import EngineObserver, ModelInfo, SteeringInfo, WeightsInfo
from paceline.server.engine.kernel_runner import KernelRunner
from paceline.server.engine.kv_arena import KvArena, MemberShape
from paceline.server.engine.kv_blocks import KvBlocks
from paceline.server.engine.native import BuiltEngine, NativeEngine
from paceline.server.engine.parts import Parts, load_parts, make_loader
from paceline.server.engine.proposers import NgramProposer, Proposer
from paceline.server.engine.runner import TorchRunner
from paceline.server.engine.scheduler import Scheduler
from paceline.server.engine.served import ServedModel
from paceline.server.engine.steering import Member, Steering
from paceline.server.engine.steering_parts import SteeringParts
from paceline.server.errors import ConfigError
from paceline.server.models.llama import Decoder
from paceline.server.models.loader import LoadedModel, ModelLoader

#: "auto" KV budget: room for this many full contexts of every model, at most a quarter of the free memory.
_AUTO_CONTEXTS = 4
_AUTO_MEMORY_SHARE = 0.25


def build_engine(
    config: PacelineConfig, observer: EngineObserver, examiner: Examiner | None = None
) -> NativeEngine:
    """An engine that loads when started; ``config`` must be resolved (device and threads not "auto")."""
    return NativeEngine(
        lambda: build_native(config, observer, examiner),
        max_queued_requests=config.server.max_queued_requests,
    )


@dataclass(frozen=True)
class Wiring:
    """Served models over one KV arena, ready to be stepped; every engine made of it starts with an empty cache."""

    served: Mapping[str, ServedModel]
    num_blocks: int
    config: EngineConfig

    def engine(self, observer: EngineObserver, *, seed: int, examiner: Examiner | None = None) -> Engine:
        """An engine over the wired models; one at a time, as they share the KV memory.

        Args:
            seed: of the generator for unseeded sampling.
            examiner: shown every verified block.
        """
        blocks = KvBlocks(self.num_blocks, prefix_caching=self.config.prefix_caching)
        scheduler = Scheduler(
            self.served,
            blocks,
            max_batch_tokens=self.config.max_batch_tokens,
            max_running=self.config.max_running,
        )
        return Engine(self.served, blocks, scheduler, observer, seed=seed, examiner=examiner)

    def with_rule(self, rule: Rule) -> "Wiring":
        """The same models and memory, with another rule of verification for unseeded sampling."""
        return replace(self, served={name: replace(model, rule=rule) for name, model in self.served.items()})


def build_native(
    config: PacelineConfig, observer: EngineObserver, examiner: Examiner | None = None
) -> BuiltEngine:
    """Load everything and wire it; blocks for as long as that takes.

    Raises:
        UserError: a model that cannot be found or loaded, a draft that does not fit, too little memory for KV.
    """
    loader = make_loader(config.engine)
    wiring = wire([load_parts(spec, loader) for spec in config.models], config.engine, loader)
    seed = int.from_bytes(os.urandom(7), "big")
    engine = wiring.engine(observer, seed=seed, examiner=examiner)
    return BuiltEngine(engine, {name: model.info for name, model in wiring.served.items()})


def wire(parts: Sequence[Parts], engine: EngineConfig, loader: ModelLoader) -> Wiring:
    """Put models over one KV arena.

    Args:
        parts: everything that is served; what they share is wired once.
        loader: that loaded them.
    """
    members = {shape.key: (shape, loaded) for p in parts for shape, loaded in p.members}
    shapes = [shape for shape, _ in members.values()]
    arena = KvArena(
        shapes,
        block_size=engine.block_size,
        total_bytes=_kv_bytes(engine, shapes, loader.device),
        device=loader.device,
    )
    runners = {
        key: make_runner(loaded, shape, arena, loader.pool) for key, (shape, loaded) in members.items()
    }
    served = {p.spec.name: _serve(p, runners, engine) for p in parts}
    return Wiring(served, arena.num_blocks, engine)


def make_runner(
    member: LoadedModel, shape: MemberShape, arena: KvArena, pool: Pool | None
) -> TorchRunner | CpuRunner:
    """What runs a member over its part of an arena; ``pool`` is that of the loader that loaded it."""
    layout = arena.layout(shape)
    if isinstance(member.weights, Decoder):
        runner = KernelRunner if wanted() == "triton" else TorchRunner
        return runner(member.weights, layout, arena.views(shape), arena.states(shape))
    assert pool is not None
    return CpuRunner(
        member.weights, pool, layout, arena.buffer, member.kv_dtype, keep_states=shape.keeps_states
    )


def _serve(parts: Parts, runners: Mapping[str, TorchRunner | CpuRunner], engine: EngineConfig) -> ServedModel:
    spec, target = parts.spec, parts.target
    proposers: dict[str, Proposer] = {}
    default = spec.speculation.draft
    runner = runners[parts.target_shape.key]
    if parts.draft is not None and parts.draft_shape is not None:
        default = _draft_name(parts.draft.path)
        proposers[default] = DraftModelProposer(
            runners[parts.draft_shape.key],
            vocab_size=target.config.vocab_size,
            max_batch_tokens=engine.max_batch_tokens,
            num_proposable=parts.draft.config.head_rows,
            target=runner if parts.reads_states else None,
        )
    steering = _steering(parts, runners)
    if steering is not None and (expert := steering.first_expert) is not None:
        index, member = expert
        proposers[EXPERT_DRAFT] = ExpertProposer(member.runner, index, vocab_size=target.config.vocab_size)
    elif default == EXPERT_DRAFT:
        raise ConfigError(
            f'model {spec.name!r}: draft "expert", but no pair has an expert beside the target itself'
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
        system_fingerprint=_fingerprint(target.key, parts.steering),
        weights_keys=tuple(loaded.key for _, loaded in parts.members),
        steering=_steering_info(parts.steering),
        weights=WeightsInfo(target.format, target.sparsity.pattern, target.sparsity.share),
    )
    policy: Policy = AdaptivePolicy() if spec.speculation.policy == "adaptive" else FixedPolicy()
    return ServedModel(
        info,
        runner,
        proposers,
        policy,
        spec.speculation.verify,
        spec.speculation.lenience_form,
        steering,
    )


def _steering(parts: Parts, runners: Mapping[str, TorchRunner | CpuRunner]) -> Steering | None:
    if parts.steering is None:
        return None
    members = [
        Member(part.name, runners[parts.member_shape(part.loaded).key], part.loaded.config.context_length)
        for part in parts.steering.members
    ]
    return Steering(parts.steering.pairs, members, vocab_size=parts.target.config.vocab_size)


def _steering_info(steering: SteeringParts | None) -> SteeringInfo | None:
    if steering is None:
        return None
    return SteeringInfo(steering.pairs, tuple(member.view for member in steering.members))


def _context_length(parts: Parts) -> int:
    """The configured length, at most what every member was made for."""
    limit = min(shape.config.context_length for shape, _ in parts.members)
    wanted = parts.spec.context_length
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"context_length {wanted} of model {parts.spec.name!r} is over its limit of {limit}"
        )
    return wanted or limit


def _draft_name(path: Path) -> str:
    return path.stem if path.suffix == ".gguf" else path.name


def _fingerprint(key: str, steering: SteeringParts | None) -> str:
    if steering is not None:
        key = "/".join([key, *(member.loaded.key for member in steering.members), repr(steering.pairs)])
    return "fp_" + hashlib.sha256(f"native/{key}".encode()).hexdigest()[:12]


def _kv_bytes(engine: EngineConfig, members: list[MemberShape], device: torch.device) -> int:
    if engine.kv_cache_gib is not None:
        return int(engine.kv_cache_gib * 2**30)
    wanted = sum(_AUTO_CONTEXTS * m.config.context_length * m.bytes_per_token for m in members)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return min(wanted, int(free * _AUTO_MEMORY_SHARE))
