"""A model's draft in vLLM's words: which speculator, from which folder, with which lossless settings.

An independent draft becomes vLLM's ``draft_model``, one that reads its target's states ``eagle``, both from a plain
bf16 folder that is made of the artifact once (``models.standalone``); n-grams are vLLM's ``ngram``. Imports no vLLM.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.server.config.schema import AUTO_DRAFT, EXPERT_DRAFT, ModelSpec
from paceline.server.config.vllm import read_schedule
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import ArtifactError, ConfigError
from paceline.server.models.bundled import bundled, bundled_draft
from paceline.server.models.checkpoint import open_checkpoint, read_json
from paceline.server.models.config import EAGLE_ARCHITECTURE, READS_STATE, architectures
from paceline.server.models.manifest import check_tokenizer, read_manifest
from paceline.server.models.sources import resolve
from paceline.server.models.standalone import plain_draft
from paceline.server.models.tokenizer import load_tokenizer, same_tokenizer_files

_log = logging.getLogger(__name__)
NGRAM = "ngram"
#: Tokens that an n-gram proposal has to match, at most and at least.
_NGRAM_LENGTHS = (3, 2)
#: A token is accepted with probability min(1, p/q) of the distribution q that it was drawn from: exact, whatever the
#: draft (arXiv:2211.17192). vLLM's "greedy" drafting is exact, too, but accepts less of sampled text.
_LOSSLESS = {"rejection_sample_method": "standard", "draft_sample_method": "probabilistic"}
#: Targets above are not looked up among the drafts that come with Paceline: those are all for smaller ones, and the
#: look-up reads every weight.
_MOST_HASHED_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Speculation:
    """How a model speculates.

    Attributes:
        name: what clients may call it.
        config: vLLM's ``speculative_config``.
        greedy_only: sampled requests cannot be served beside it.
        unseeded: it draws its tokens without the request's seed (vLLM's ``compute_probs_and_sample_next_token``), so
            that a seed would not repeat a sampled text.
    """

    name: str
    config: Mapping[str, Any]
    greedy_only: bool = False
    unseeded: bool = False


def find_speculation(
    spec: ModelSpec, target: Path, tokenizer: Tokenizer, *, greedy_only: bool
) -> Speculation | None:
    """How a model is to speculate; None for not at all.

    Args:
        target: folder or file of the model.
        tokenizer: of the model.
        greedy_only: whether this vLLM samples wrongly beside a draft (``plugin``).

    Raises:
        UserError: a draft that cannot be found, does not fit or has no form that vLLM loads.
    """
    found = _find(spec, target, tokenizer, greedy_only=greedy_only)
    if found is None:
        return None
    wish = spec.speculation
    ranges = read_schedule(wish.draft_schedule, wish.max_draft_tokens, "models.speculation.draft_schedule")
    by_batch = {"num_speculative_tokens_per_batch_size": ranges} if ranges else {}
    return replace(found, greedy_only=greedy_only, config={**found.config, **by_batch})


def _find(spec: ModelSpec, target: Path, tokenizer: Tokenizer, *, greedy_only: bool) -> Speculation | None:
    name, length = spec.speculation.draft, spec.speculation.max_draft_tokens
    if name is None:
        return None
    if name == AUTO_DRAFT:  # nobody asked for a draft that would rule out sampling
        return None if greedy_only else _automatic(target, tokenizer, length)
    if name == EXPERT_DRAFT:
        raise ConfigError('models.speculation.draft: "expert" is steering, which only the native engine does')
    if name == NGRAM:
        longest, shortest = _NGRAM_LENGTHS
        lookup = {"prompt_lookup_max": longest, "prompt_lookup_min": shortest}
        return Speculation(name, {"method": NGRAM, "num_speculative_tokens": length, **lookup})
    return _draft(resolve(name), target, tokenizer, length)


def _bundled_for(target: Path) -> str | None:
    """The draft that comes with Paceline for a target, if there is one."""
    files = list(target.glob("*.safetensors")) if target.is_dir() else [target]
    if not bundled() or sum(file.stat().st_size for file in files) > _MOST_HASHED_BYTES:
        return None
    return bundled_draft(open_checkpoint(target).weights_sha256())


def _automatic(target: Path, tokenizer: Tokenizer, length: int) -> Speculation | None:
    name = _bundled_for(target)
    if name is None:
        return None
    try:
        return _draft(resolve(name), target, tokenizer, length)
    except ArtifactError as error:
        _log.warning("serving without the draft %s, which vLLM cannot load: %s", name, error)
        return None


def _draft(path: Path, target: Path, tokenizer: Tokenizer, length: int) -> Speculation:
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is not None:
        check_tokenizer(tokenizer.sha256, manifest.base.tokenizer_sha256)
    if not same_tokenizer_files(path, target):
        check_tokenizer(tokenizer.sha256, load_tokenizer(path).sha256)
    folder = plain_draft(path, target)
    config = {
        "method": "eagle" if _reads_states(folder) else "draft_model",
        "model": str(folder),
        "num_speculative_tokens": length,
        **_LOSSLESS,
    }
    return Speculation(path.stem if path.suffix == ".gguf" else path.name, config, unseeded=True)


def _reads_states(folder: Path) -> bool:
    config = read_json(folder / "config.json")
    named = architectures(config, str(folder / "config.json"))
    return EAGLE_ARCHITECTURE in named or bool(config.get(READS_STATE))
