"""One checkpoint's plans for the CPU executor: packed in a format, or taken from the packed cache.

"mixed" is int8 with the parts that ``auto_weights`` named left in bf16. Only what takes long to pack is cached:
int8 and mixed; fp32 and bf16 pack as fast as they can be read.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import Format
from paceline.server.models import config_note
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import ModelConfig
from paceline.server.models.native_form import draft_vocab
from paceline.server.models.packed_cache import PackedCache
from paceline.server.models.plan import PlanBuilder
from paceline.server.models.progress import Progress
from paceline.server.models.tensors import CheckedTensors, total_bytes

PackedFormat = Literal["fp32", "bf16", "int8", "mixed"]
#: What a mixed plan can keep in bf16: a kind of linear in every block, the head, or all linears of one block.
LINEARS = ("qkv", "output", "gate_up", "down")
HEAD, FIRST, LAST = "head", "first block", "last block"
PARTS = (*LINEARS, HEAD, FIRST, LAST)
#: Names of notes beside packed weights.
CONFIG, _KEPT = "config", "kept"


class Packer:
    """Packs one checkpoint.

    Args:
        progress: where quantizing shows itself.
        cached: whether packed weights are taken from the cache and put there; if not, quantizing shows nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        pool: Pool,
        progress: Progress,
        sha256: str,
        *,
        cached: bool = True,
    ) -> None:
        self.checkpoint, self.config, self.pool = checkpoint, config, pool
        self._progress, self.sha256, self._cached = progress, sha256, cached

    def cache(self, format: PackedFormat) -> PackedCache:
        """The cache file of this checkpoint in a format."""
        return PackedCache(self.sha256, format)

    def plan(self, format: PackedFormat, kept: Sequence[str] = ()) -> DecoderPlan:
        """The checkpoint in ``format``.

        Args:
            kept: names from ``PARTS`` that stay in bf16, for "mixed".
        """
        if format in ("fp32", "bf16"):
            return self._pack(format)
        cache = self.cache(format)
        fits = self._cached and (format == "int8" or cache.note(_KEPT) == list(kept))
        plan = cache.load(self.config) if fits else None
        if plan is None:
            plan = self._pack("int8") if format == "int8" else mix(self.plan("int8"), self.plan("bf16"), kept)
            self.save(plan, format, {} if format == "int8" else {_KEPT: list(kept)})
        return plan

    def save(self, plan: DecoderPlan, format: PackedFormat, notes: Mapping[str, Any]) -> None:
        """Cache a plan, if this checkpoint is cached, with notes and with the parsed configuration."""
        if not self._cached:
            return
        config = config_note.describe(self.checkpoint.hf_config, self.config)
        self.cache(format).save(plan, {CONFIG: config, **notes})

    def _pack(self, format: Format) -> DecoderPlan:
        label, size = f"quantizing {self.checkpoint.path.name} to int8", total_bytes(self.config)
        quiet = format != "int8" or not self._cached
        shown = nullcontext(lambda done: None) if quiet else self._progress.task(label, size)
        with shown as update:
            fetch = CheckedTensors(self.checkpoint, self.config, update=update)
            plan = PlanBuilder(
                self.config, fetch, self.pool, format, stored_int8=fetch.int8, stored_sparse=fetch.sparse
            ).build()
        return replace(plan, vocab_ids=draft_vocab(self.checkpoint))


def mix(int8: DecoderPlan, bf16: DecoderPlan, kept: Sequence[str]) -> DecoderPlan:
    """``int8`` with the linears that ``kept`` names taken from ``bf16``."""
    blocks = {FIRST: 0, LAST: len(int8.layers) - 1}
    whole = {blocks[name] for name in kept if name in blocks}
    layers = []
    for index, (small, large) in enumerate(zip(int8.layers, bf16.layers, strict=True)):
        names = LINEARS if index in whole else [name for name in LINEARS if name in kept]
        layers.append(replace(small, **{name: getattr(large, name) for name in names}))
    return replace(int8, layers=tuple(layers), head=bf16.head if HEAD in kept else int8.head)
