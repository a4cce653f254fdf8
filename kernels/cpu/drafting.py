"""How draft tokens are chosen natively, as Python says it and as C reads it (``pl_draw``, ``pl_draft``)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paceline.kernels.cpu.library import F32, I32, I64, PTR, U64, flat_tables

DrawMode = Literal["greedy", "seeded", "sampled"]
_MODES: dict[DrawMode, int] = {"greedy": 0, "seeded": 1, "sampled": 2}
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Edit:
    """What biases and penalties do to one logit x, the ``column`` of the draft's.

    x += bias; then x / penalty, or x * penalty where x <= 0; then x += shift. ``counted``: the shift has the presence
    penalty already.
    """

    column: int
    bias: float = 0.0
    penalty: float = 1.0
    shift: float = 0.0
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Draw:
    """How a sequence's draft tokens are chosen.

    Edits, temperature, top_k, top_p and min_p in this order, then the argmax of scores + noise ("seeded") or a draw
    ("sampled"); "greedy" is the argmax after the edits.

    Attributes:
        sequence: its index in the batch.
        length: tokens to draft, at least 1.
        temperature, top_k, top_p, min_p: as in a request.
        repetition, presence, frequency: penalties of the drafted tokens themselves, for those that follow.
        edits: penalties and biases of the text before.
        noise: for "seeded", the noise stream of the choice (``noise.stream``).
        position: for "seeded", that of the first draft token.
        uniforms: for "sampled", float64 [length] in [0, 1).
    """

    sequence: int
    length: int
    mode: DrawMode = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    edits: Sequence[Edit] = ()
    noise: int = 0
    position: int = 0
    uniforms: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Drafted:
    """A sequence's draft tokens, and for "sampled" the distributions they were drawn from, fp32 [length, columns]."""

    tokens: list[int]
    probs: Tensor | None = None


class _Edit(ctypes.Structure):
    _fields_ = (("column", I32), ("counted", I32), *((name, F32) for name in ("bias", "penalty", "shift")))


class _Draw(ctypes.Structure):
    _fields_ = (
        *((name, I32) for name in ("sequence", "length", "mode", "top_k")),
        *((name, F32) for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")),
        ("edits", I32),
        ("edit", PTR),
        ("noise", U64),
        ("position", I64),
        ("uniforms", PTR),
        ("probs", PTR),
    )


class _Draft(ctypes.Structure):
    _fields_ = (
        *((name, I32) for name in ("drafts", "columns", "stride")),
        *((name, PTR) for name in ("draw", "tokens", "target", "target_table_start", "target_tables")),
    )


class DraftArrays:
    """A pl_draft and the arrays it points into.

    Args:
        draws: the drafting sequences, in the order of the batch's wanted rows.
        columns: logits that may be drawn, the first ones of the head.
        target: address of the pl_model that kept the states before the batch's rows; None where none are read.
        tables: the target's blocks, by sequence of the batch.
    """

    def __init__(
        self,
        draws: Sequence[Draw],
        columns: int,
        target: int | None = None,
        tables: Sequence[Sequence[int]] = (),
    ) -> None:
        self._lengths = [d.length for d in draws]
        self._stride = max(self._lengths)
        self._tokens = (I32 * (self._stride * len(draws)))()
        self._probs = [torch.empty(d.length, columns) if d.mode == "sampled" else None for d in draws]
        self._edits = [_edits(d.edits) for d in draws]
        self._uniforms = [None if d.uniforms is None else d.uniforms.contiguous() for d in draws]
        self._draws = (_Draw * len(draws))(
            *map(_draw, draws, self._edits, self._uniforms, self._probs),
        )
        self._tables = flat_tables(tables)
        self._draft = _Draft(
            len(draws),
            columns,
            self._stride,
            ctypes.addressof(self._draws),
            ctypes.addressof(self._tokens),
            target,
            *map(ctypes.addressof, self._tables),
        )
        self.address = ctypes.addressof(self._draft)

    def drafted(self) -> list[Drafted]:
        """What the native call wrote."""
        starts = range(0, len(self._tokens), self._stride)
        return [
            Drafted(self._tokens[at : at + length], probs)
            for at, length, probs in zip(starts, self._lengths, self._probs, strict=True)
        ]


def _edits(edits: Sequence[Edit]) -> "ctypes.Array[_Edit]":
    return (_Edit * len(edits))(*(_Edit(e.column, e.counted, e.bias, e.penalty, e.shift) for e in edits))


def _draw(draw: Draw, edits: "ctypes.Array[_Edit]", uniforms: Tensor | None, probs: Tensor | None) -> _Draw:
    if draw.mode == "sampled":
        assert uniforms is not None
        assert uniforms.dtype is torch.float64
        assert uniforms.shape == (draw.length,)
    return _Draw(
        draw.sequence,
        draw.length,
        _MODES[draw.mode],
        draw.top_k,
        draw.temperature,
        draw.top_p,
        draw.min_p,
        draw.repetition,
        draw.presence,
        draw.frequency,
        len(edits),
        ctypes.addressof(edits),
        draw.noise & _WORD,
        draw.position,
        None if uniforms is None else uniforms.data_ptr(),
        None if probs is None else probs.data_ptr(),
    )
