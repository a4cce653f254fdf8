"""Packed weights on disk, so that a model is quantized once: one safetensors file per checkpoint and format.

Files are named after the checkpoint's hash, the format and the layout's version; whatever is unreadable or of another
shape is made again. Loading maps the file; the loader copies weights out of it. Notes beside the plan
say what was found out about it; what they say is not this module's business.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paceline.kernels.cpu.plan import DecoderPlan, LayerPlan
from paceline.kernels.formats import PackedLinear
from paceline.server.models.config import ModelConfig
from paceline.server.models.sources import cache_dir

_log = logging.getLogger(__name__)
#: Raised whenever the packed layout, the quantization or what the notes describe changes.
LAYOUT_VERSION = 5


class PackedCache:
    """The cache file of one checkpoint in one format."""

    def __init__(self, weights_sha256: str, format: str) -> None:
        self.path = cache_dir() / "packed" / f"{weights_sha256}-{format}-v{LAYOUT_VERSION}.safetensors"

    def save(self, plan: DecoderPlan, notes: Mapping[str, Any] | None = None) -> None:
        """Write atomically, with JSON notes by name; a full disk costs the cache, not the start."""
        tensors, meta = _flatten(plan)
        about = {f"note.{name}": json.dumps(note) for name, note in (notes or {}).items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                part = Path(folder) / "part"
                save_file(tensors, part, metadata={"plan": json.dumps(meta)} | about)
                part.replace(self.path)
        except (OSError, SafetensorError) as error:
            _log.warning("packed weights are not cached: %s", error)

    def note(self, name: str) -> Any:
        """A note that ``save`` was given, without loading the plan; None if there is none."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                return json.loads(file.metadata().get(f"note.{name}", "null"))
        except (OSError, SafetensorError, AttributeError, ValueError):
            return None  # an unreadable file has nothing to say; ``load`` says what is wrong with it

    def load(self, config: ModelConfig) -> DecoderPlan | None:
        """The cached plan, or None if there is none that can be used."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                meta = json.loads(file.metadata()["plan"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            plan = _restore(tensors, meta)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            _log.warning("packed weights in %s cannot be read (%s); packing again", self.path, error)
            return None
        found = (len(plan.layers), plan.vocab, plan.head.out_features)
        return plan if found == (config.num_layers, config.vocab_size, config.head_rows) else None


def _flatten(plan: DecoderPlan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under dotted names, everything else as JSON."""
    tensors: dict[str, Tensor] = {}

    def describe(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, PackedLinear | LayerPlan | DecoderPlan):
            return {f.name: describe(getattr(value, f.name), f"{name}.{f.name}") for f in fields(value)}
        if isinstance(value, tuple):
            return [describe(item, f"{name}.{i}") for i, item in enumerate(value)]
        return value

    return tensors, describe(plan, "plan")


def _restore(tensors: dict[str, Tensor], meta: dict[str, Any]) -> DecoderPlan:
    def value(described: Any) -> Any:
        if isinstance(described, dict) and "tensor" in described:
            return tensors[described["tensor"]]
        if isinstance(described, dict):
            return PackedLinear(**{k: value(v) for k, v in described.items()})
        return described

    layers = tuple(LayerPlan(**{k: value(v) for k, v in layer.items()}) for layer in meta["layers"])
    rest = {k: value(v) for k, v in meta.items() if k != "layers"}
    return DecoderPlan(layers=layers, **rest)
