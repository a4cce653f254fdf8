"""``--weights auto`` on the CPU kernels: the fastest format that meets the quality bar for this very checkpoint.

int8 if it is good enough, else int8 with as few parts as needed kept in bf16, else bf16. Measured once per checkpoint
on the built-in text; the decision and its figures live in the metadata of the int8 cache file.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from paceline.kernels.cpu.plan import DecoderPlan
from paceline.server.models.packer import HEAD, LINEARS, PARTS, Packer, mix
from paceline.server.models.quality import WINDOW_TOKENS, Judge, Quality, calibration_text, split
from paceline.server.models.tensors import total_bytes
from paceline.server.models.tokenizer import load_tokenizer

_log = logging.getLogger(__name__)
#: Raised when the bar, the text or the search change: decisions made before are then made again.
_RULES = 1
_NOTE = "decision"
_WINDOWS = 8
#: The search for parts to keep measures every part on this many windows, then whole candidates on all of them.
_SEARCH_WINDOWS = 2
_FREE_SHARE = 0.8


@dataclass(frozen=True)
class Decision:
    """What "auto" means for one checkpoint.

    Attributes:
        kept: parts that stay in bf16 ("mixed" only).
        quality: of that format; None if there was no memory to measure it, or none was needed (bf16).
        reference: what it was compared with: bf16 where fp32 does not fit in memory.
    """

    format: Literal["int8", "mixed", "bf16"]
    kept: tuple[str, ...] = ()
    quality: Quality | None = None
    reference: Literal["fp32", "bf16"] = "fp32"

    def __str__(self) -> str:
        words = f"int8 with {', '.join(self.kept)} in bf16" if self.kept else self.format
        if self.quality is None:
            return words
        return f"{words}, {self.quality}" + ("" if self.reference == "fp32" else " (against bf16)")


def decide(packer: Packer) -> Decision:
    """The stored decision, or a new one, which is stored."""
    stored = _restore(packer.cache("int8").note(_NOTE))
    if stored is not None:
        return stored
    int8 = packer.plan("int8")
    decision = _measure(packer, int8)
    if decision.quality is not None or decision.format == "bf16":
        packer.save(int8, "int8", {_NOTE: _describe(decision)})
    return decision


def _measure(packer: Packer, int8: DecoderPlan) -> Decision:
    judge, reference = _judge(packer)
    if judge is None:
        _log.warning(
            "weights auto: int8 without measuring it: neither fp32 nor bf16 of %s fits in memory for comparison",
            packer.checkpoint.path,
        )
        return Decision("int8")
    quality = judge.measure(int8)
    if quality.good:
        return Decision("int8", (), quality, reference)
    _log.info("weights auto: int8 misses the bar (%s); looking for parts to keep in bf16", quality)
    return _search(judge, int8, packer.plan("bf16"), reference)


def _judge(packer: Packer) -> tuple[Judge | None, Literal["fp32", "bf16"]]:
    free = psutil.virtual_memory().available * _FREE_SHARE
    fp32_bytes = total_bytes(packer.config)
    formats: tuple[tuple[Literal["fp32", "bf16"], int], ...] = (
        ("fp32", fp32_bytes),
        ("bf16", fp32_bytes // 2),
    )
    windows = calibration_windows(packer)
    for format, size in formats:
        if size <= free:
            _log.info("weights auto: measuring int8 against %s on %d tokens", format, sum(map(len, windows)))
            return Judge(packer.plan(format), windows, packer.pool), format
    return None, "fp32"


def calibration_windows(packer: Packer) -> list[list[int]]:
    """The built-in text in the model's tokens: at most ``_WINDOWS`` windows, spread over all of it."""
    tokens = load_tokenizer(packer.checkpoint.path).encode(calibration_text(), add_special_tokens=False)
    known = [token for token in tokens if token < packer.config.vocab_size]
    windows = split(known, min(WINDOW_TOKENS, packer.config.context_length))
    return windows[:: -(-len(windows) // _WINDOWS)]


def _search(
    judge: Judge, int8: DecoderPlan, bf16: DecoderPlan, reference: Literal["fp32", "bf16"]
) -> Decision:
    """Keep parts in the order of KL saved per byte added until the bar is met; bf16 if only everything meets it.

    At most 2 * len(PARTS) measurements.
    """
    base = judge.measure(int8, windows=_SEARCH_WINDOWS).kl_nats
    gain: dict[str, float] = {}
    for part in PARTS:
        plan = mix(int8, bf16, [part])
        saved = base - judge.measure(plan, windows=_SEARCH_WINDOWS).kl_nats
        gain[part] = saved / max(1, plan.bytes_per_forward - int8.bytes_per_forward)
    ranked = sorted(PARTS, key=lambda part: gain[part], reverse=True)
    for count in range(1, len(ranked)):
        kept = ranked[:count]
        if set(kept) >= {*LINEARS, HEAD}:
            break
        quality = judge.measure(mix(int8, bf16, kept))
        _log.info("weights auto: with %s in bf16: %s", ", ".join(kept), quality)
        if quality.good:
            return Decision("mixed", tuple(kept), quality, reference)
    return Decision("bf16", (), judge.measure(bf16), reference)


def _describe(decision: Decision) -> dict[str, Any]:
    quality = None if decision.quality is None else decision.quality.as_dict()
    return {
        "rules": _RULES,
        "format": decision.format,
        "kept": list(decision.kept),
        "quality": quality,
        "reference": decision.reference,
    }


def _restore(about: Any) -> Decision | None:
    if not isinstance(about, dict) or about.get("rules") != _RULES:
        return None
    quality = None if about["quality"] is None else Quality(**about["quality"])
    return Decision(about["format"], tuple(about["kept"]), quality, about["reference"])
