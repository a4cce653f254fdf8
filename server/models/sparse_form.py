"""Sparse linears of artifacts: which tensors one is made of, and what the manifest and ``config.json`` say of them.

``X.weight`` is stored as ``X.weight_bitmask``, ``X.weight_values``, ``X.weight_row_offsets`` (not for n:m) and, for
int8 values, ``X.weight_scale``; the layout is that of ``kernels.formats.SparseWeight``. All sparse linears of an
artifact have one pattern and one type of values. Only the projections of blocks are sparse; embeddings, norms and the
head are dense. Knows nothing of targets and of what becomes of the weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paceline.kernels.formats import VALUE_DTYPES, FormatError, Pattern, SparseWeight, ValueDtype
from paceline.server.errors import ArtifactError
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.manifest import MANIFEST

SPARSE_FORMATS = ("bitmask", "n:m")
QUANTIZATION, QUANT_METHOD = "quantization_config", "paceline"
SCALE = "_scale"
_BITMASK, _VALUES, _OFFSETS = "_bitmask", "_values", "_row_offsets"
_PARTS = (_BITMASK, _VALUES, _OFFSETS)


@dataclass(frozen=True, slots=True)
class SparseForm:
    """How an artifact stores its sparse linears."""

    pattern: Pattern
    value_dtype: ValueDtype

    @classmethod
    def parse(cls, weights: Mapping[str, Any], where: str) -> "SparseForm | None":
        """From ``weights`` of a manifest; None for a dense format.

        Raises:
            ArtifactError: one line saying which field is wrong.
        """
        if weights["format"] not in SPARSE_FORMATS:
            return None
        value_dtype: Any = weights.get("value_dtype")
        n: Any = weights.get("n")
        m: Any = weights.get("m")
        if value_dtype not in VALUE_DTYPES:
            raise ArtifactError(
                f"{where}: value_dtype must be one of {', '.join(VALUE_DTYPES)}, but is {value_dtype!r}"
            )
        if weights["format"] == "bitmask":
            if n is not None or m is not None:
                raise ArtifactError(f"{where}: format bitmask has no n and m; format n:m has")
            return cls(Pattern(), value_dtype)
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in (n, m)):
            raise ArtifactError(
                f"{where}: format n:m needs whole numbers n and m, but they are {n!r} and {m!r}"
            )
        if not 0 < n < m:
            raise ArtifactError(f"{where}: format n:m needs 0 < n < m, not {n}:{m}")
        return cls(Pattern(n, m), value_dtype)

    @classmethod
    def common(cls, sparse: Mapping[str, SparseWeight]) -> "SparseForm":
        """That of all these weights.

        Raises:
            ArtifactError: there are none, or they differ.
        """
        forms = {cls(weight.pattern, weight.value_dtype): name for name, weight in sparse.items()}
        if len(forms) == 1:
            return next(iter(forms))
        if not forms:
            raise ArtifactError("a sparse artifact needs sparse weights, and there are none")
        (a, first), (b, second) = list(forms.items())[:2]
        raise ArtifactError(
            f"{first} is {a}, but {second} is {b}: an artifact has one pattern and one value type"
        )

    @property
    def in_int8(self) -> bool:
        """Whether values are int8."""
        return self.value_dtype == "int8"

    @property
    def fields(self) -> dict[str, Any]:
        """``weights`` of the manifest, and what ``config.json`` repeats."""
        if not self.pattern.structured:
            return {"format": "bitmask", "value_dtype": self.value_dtype}
        n_of_m = {"n": self.pattern.n, "m": self.pattern.m}
        return {"format": "n:m", "value_dtype": self.value_dtype, **n_of_m}

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What ``config.json`` says, so that other loaders know that they cannot read the weights."""
        return {"quant_method": QUANT_METHOD, **self.fields}

    def parts(self, name: str) -> list[str]:
        """The tensors that a sparse ``name`` is made of."""
        suffixes = [_BITMASK, _VALUES]
        suffixes += [] if self.pattern.structured else [_OFFSETS]
        return [name + suffix for suffix in (*suffixes, *([SCALE] if self.in_int8 else []))]

    def num_values(self, stored: Checkpoint, name: str) -> int:
        """How many values a sparse linear stores; nothing is read but their shape."""
        return stored.tensor(name + _VALUES).numel()

    def read(self, stored: Checkpoint, name: str, in_features: int) -> SparseWeight:
        """One linear.

        Raises:
            ArtifactError: its parts contradict each other or the form; one line that names the tensor.
        """
        parts = dict(zip(self.parts(name), map(stored.tensor, self.parts(name)), strict=True))
        try:
            weight = SparseWeight(
                self.pattern,
                in_features,
                parts[name + _BITMASK],
                parts[name + _VALUES],
                parts.get(name + _OFFSETS),
                parts.get(name + SCALE),
            )
        except FormatError as error:
            raise ArtifactError(f"{stored.path}: {name}: {error}") from error
        if weight.value_dtype != self.value_dtype:
            raise ArtifactError(
                f"{stored.path}: {name}{_VALUES} is {weight.value_dtype}, "
                f"but {MANIFEST} says weights.value_dtype {self.value_dtype}"
            )
        return weight

    def problems(self, names: Iterable[str]) -> Iterator[str]:
        """What is wrong with the stored names, as far as it shows without reading tensors."""
        stored = frozenset(names)
        sparse = sparse_names(stored)
        if not sparse:
            yield f"{MANIFEST} says weights.format {self.fields['format']}, but there are no sparse weights"
        for name in sorted(sparse):
            if not name.endswith("_proj.weight"):
                yield f"{name} is sparse, but only the projections of blocks can be"
            if name in stored:
                yield f"{name} is stored dense and sparse at once"
            expected = set(self.parts(name))
            found = {name + suffix for suffix in (*_PARTS, SCALE)} & stored
            for part in sorted(expected - found):
                yield f"tensor {part} is missing"
            for part in sorted(found - expected):
                yield f"tensor {part} is not of a {self} weight"

    def __str__(self) -> str:
        return f"{self.pattern} {self.value_dtype}"


def sparse_names(stored: Iterable[str]) -> frozenset[str]:
    """The linears that stored tensors are parts of."""
    return frozenset(
        name.removesuffix(suffix) for name in stored for suffix in _PARTS if name.endswith(".weight" + suffix)
    )


def part_names(sparse: Iterable[str]) -> frozenset[str]:
    """All tensors that could be parts of these."""
    return frozenset(name + suffix for name in sparse for suffix in (*_PARTS, SCALE))


def parts_of(name: str, weight: SparseWeight) -> dict[str, Tensor]:
    """The tensors to store for a sparse linear."""
    parts = {name + _BITMASK: weight.bitmask, name + _VALUES: weight.values}
    if weight.row_offsets is not None:
        parts[name + _OFFSETS] = weight.row_offsets
    if weight.scale is not None:
        parts[name + SCALE] = weight.scale
    return parts


def take_quantization(config: Mapping[str, Any], form: SparseForm | None, where: str) -> dict[str, Any]:
    """``config.json`` without its ``quantization_config``, if that is ours and says what the manifest says.

    Raises:
        ArtifactError: it is missing, or says something else.
    """
    if form is None:
        return dict(config)
    said = config.get(QUANTIZATION)
    if not isinstance(said, Mapping) or any(said.get(k) != v for k, v in form.quantization_config.items()):
        raise ArtifactError(
            f"{where}: {QUANTIZATION} must be {form.quantization_config}, as {MANIFEST} says, but is {said!r}"
        )
    return {key: value for key, value in config.items() if key != QUANTIZATION}
