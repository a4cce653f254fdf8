"""What one served model consists of, loaded and checked: target, tokenizer, draft.

Owns how references of a configuration become weights. Wiring them over one KV arena is ``build``'s business.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from paceline.kernels.cpu.library import Pool
from paceline.kernels.formats import LANES
from paceline.server.config.schema import AUTO_DRAFT, EXPERT_DRAFT, EngineConfig, ModelSpec
from paceline.server.engine.interface import Tokenizer
from paceline.server.engine.kv_arena import MemberShape
from paceline.server.engine.steering_parts import SteeringParts, load_steering
from paceline.server.errors import ConfigError
from paceline.server.models.bundled import bundled_draft
from paceline.server.models.loader import LoadedModel, ModelLoader, kernels_wanted
from paceline.server.models.manifest import Manifest, check_tokenizer, read_manifest
from paceline.server.models.sources import resolve
from paceline.server.models.student import declaration, is_student
from paceline.server.models.tokenizer import HfTokenizer, load_tokenizer, same_tokenizer_files

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Parts:
    """One served model's loaded pieces; ``target`` is what is served."""

    spec: ModelSpec
    tokenizer: HfTokenizer
    target: LoadedModel
    draft: LoadedModel | None
    steering: SteeringParts | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes, all members together."""
        return sum(shape.bytes_per_token for shape, _ in self.members)

    @property
    def reads_states(self) -> bool:
        """Whether the draft reads the target's states, which are kept for it then."""
        return self.draft is not None and self.draft.config.reads_state

    @property
    def target_shape(self) -> MemberShape:
        """The target as the KV arena sees it."""
        key = f"{self.target.key}/states" if self.reads_states else self.target.key
        return MemberShape(key, self.target.config, self.target.kv_dtype, keeps_states=self.reads_states)

    @property
    def draft_shape(self) -> MemberShape | None:
        """The draft as the KV arena sees it, if there is one; KV that follows from states depends on whose they are."""
        if self.draft is None:
            return None
        key = f"{self.draft.key}/of/{self.target.key}" if self.reads_states else self.draft.key
        return MemberShape(key, self.draft.config, self.draft.kv_dtype)

    def member_shape(self, loaded: LoadedModel) -> MemberShape:
        """A steering member as the KV arena sees it; what is the target, under another prompt, runs as the target."""
        if loaded.key == self.target.key:
            return self.target_shape
        return MemberShape(loaded.key, loaded.config, loaded.kv_dtype)

    @property
    def members(self) -> list[tuple[MemberShape, LoadedModel]]:
        """Everything that stores KV, once for every table that a sequence has."""
        pairs = [(self.target_shape, self.target), (self.draft_shape, self.draft)]
        steering = () if self.steering is None else self.steering.members
        return [
            *((shape, loaded) for shape, loaded in pairs if shape is not None and loaded is not None),
            *((self.member_shape(member.loaded), member.loaded) for member in steering),
        ]


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


def load_parts(spec: ModelSpec, loader: ModelLoader, *, fleeting: bool = False) -> Parts:
    """Load what a served model consists of.

    Args:
        fleeting: of the target, see ``ModelLoader.load``.

    Raises:
        UserError: a model that cannot be found or loaded, or a draft that does not fit.
    """
    path = resolve(spec.target)
    tokenizer = _timed(f"tokenizer of {spec.name}", lambda: load_tokenizer(path))
    target = _timed(
        f"weights of {spec.name} ({spec.weights})",
        lambda: loader.load(path, spec.weights, fleeting=fleeting),
    )
    if target.config.head_rows != target.config.vocab_size:
        raise ConfigError(
            f"{path} knows {target.config.head_rows} of {target.config.vocab_size} ids, so that it can only draft: "
            "serve its target and name it with --draft"
        )
    if target.config.reads_state:
        raise ConfigError(
            f"{path} reads the states of a target, so that it can only draft: serve its target and name it with --draft"
        )
    manifest = read_manifest(path)
    if manifest is not None and is_student(manifest):
        _log.warning("%s", declaration(manifest, path))
    steering = load_steering(spec, target, tokenizer, loader)
    speculation = spec.speculation
    if speculation.draft == AUTO_DRAFT:
        speculation = replace(speculation, draft=_auto_draft(spec, target, manifest))
    spec = replace(spec, speculation=speculation)
    return Parts(spec, tokenizer, target, load_draft(spec, target, tokenizer, loader), steering)


def _auto_draft(spec: ModelSpec, target: LoadedModel, manifest: Manifest | None) -> str | None:
    """The draft that comes with Paceline for the target; for a steered one without it, the expert."""
    expert = EXPERT_DRAFT if any(pair.expert is not None for pair in spec.steering) else None
    return _bundled_for(target, manifest) or expert


def _bundled_for(target: LoadedModel, manifest: Manifest | None) -> str | None:
    """The draft that comes with Paceline for a target; a student that has none takes its parent's."""
    own = bundled_draft(target.weights_sha256)
    if own is None and manifest is not None and is_student(manifest):
        return bundled_draft(manifest.base.weights_sha256)
    return own


def load_draft(
    spec: ModelSpec,
    target: LoadedModel,
    tokenizer: Tokenizer,
    loader: ModelLoader,
    *,
    fleeting: bool = False,
) -> LoadedModel | None:
    """Load the draft model that ``spec`` names, if it names one, and see that it fits the target.

    Args:
        tokenizer: the target's.
        fleeting: see ``ModelLoader.load``.

    Raises:
        UserError: it cannot be found or loaded, or does not fit.
    """
    reference = spec.speculation.draft
    if reference is None or reference in ("ngram", EXPERT_DRAFT):
        return None
    path = resolve(reference)
    manifest = read_manifest(path)
    if manifest is not None:
        check_tokenizer(tokenizer.sha256, manifest.base.tokenizer_sha256)
    if not same_tokenizer_files(path, target.path):
        check_tokenizer(tokenizer.sha256, load_tokenizer(path).sha256)
    # Measuring which format is good enough takes longer than it can win: rounding a draft never changes the output.
    weights = "int8" if spec.weights == "auto" and loader.pool is not None else spec.weights
    draft = _timed(
        f"draft of {spec.name}",
        lambda: loader.load(path, weights, target=target.path, fleeting=fleeting),
    )
    if draft.config.reads_state and draft.config.hidden_size != target.config.hidden_size:
        raise ConfigError(
            f"{path} reads states of width {draft.config.hidden_size}, but those of {target.path} have "
            f"{target.config.hidden_size}: use the draft with the target it was made for"
        )
    return draft


def _timed(what: str, load: Callable[[], _T]) -> _T:
    started = time.monotonic()
    result = load()
    _log.info("loaded %s in %.1f s", what, time.monotonic() - started)
    return result
