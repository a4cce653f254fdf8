"""Every kernel, compiled for GPUs that are not here: ``triton.compile`` with a ``GPUTarget`` needs none.

Owns the list of variants that a served model launches, and the targets. To be imported in a process whose triton
compiles (see ``runtime``): a triton that interprets has nothing to compile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paceline.kernels.gpu import combine, expand, sparse_linear, verify
from paceline.kernels.gpu.table import find

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Type of the values -> type of x that a server would use with it.
_ACTIVATIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "bf16"}
_POINTER = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*i8"}
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
#: Multiples of 16 in every model that is known here, which the runtime sees and makes use of.
_ALIGNED_SIZES = ("out_features", "in_features", "width")
_COUNTS = ("chunks", "column_tiles", "tiles_per_split", "splits", "depth")
_ROWS, _COLUMNS, _CHUNKS = 16, 128, 64


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that is known when it is compiled.

    Attributes:
        label: tells variants of a kernel apart, such as ``bitmask 50% bf16``.
        kernel: the decorated function.
        arguments: type of each argument that is known only at run time.
        constants: the others.
        options: ``num_warps`` and the like.
    """

    label: str
    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Kernel and label."""
        return f"{self.kernel.__name__} {self.label}".strip()


def compile_for(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel: ``asm`` holds every stage, ``metadata`` the shared memory."""
    types = {**variant.arguments, **dict.fromkeys(variant.constants, "constexpr")}
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: types[name] for name in names},
        constexprs=variant.constants,
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n in variant.arguments
            if _is_aligned(n, types[n])
        },
    )
    options = {"enable_fp_fusion": True, **variant.options}
    return triton.compile(source, target=TARGETS[target], options=options)


def _is_aligned(name: str, type_: Any) -> bool:
    return name in _ALIGNED_SIZES or (isinstance(type_, str) and type_.startswith("*"))


def variants() -> Iterator[Variant]:
    """What is compiled and reported: every kernel, the sparse ones in every format and with every flag."""
    plain = list(_variants())
    yield from plain
    for kernel in dict.fromkeys(variant.kernel for variant in plain):
        variant = next(v for v in plain if v.kernel is kernel)
        yield _of_ones(variant)
        for flag in ("HAS_BIAS", "IS_PARTIAL", "IN_FP32"):
            if variant.constants.get(flag) is False:
                yield replace(
                    variant, label=f"{variant.label}, {flag}", constants={**variant.constants, flag: True}
                )


def _of_ones(variant: Variant) -> Variant:
    """Counts of 1, which triton takes for known when compiling."""
    ones = {name: 1 for name in variant.arguments if name in _COUNTS}
    rest = {name: type_ for name, type_ in variant.arguments.items() if name not in ones}
    return replace(
        variant,
        label=f"{variant.label}, ones".lstrip(", "),
        arguments=rest,
        constants={**variant.constants, **ones},
    )


def _variants() -> Iterator[Variant]:
    for dtype in _POINTER:
        for layout, longest, per_word in (
            ("bitmask 50%", 2048, 0),
            ("bitmask 75%", 1024, 0),
            ("16:32", 1024, 16),
        ):
            yield from _sparse(f"{layout} {dtype}", dtype, longest, per_word)
    yield _gemm("bitmask 50% bf16, 64 rows", "bf16", 2048, 0, block=64)
    yield _gemm("16:32 bf16, 64 rows", "bf16", 1024, 16, block=64)
    partial = {"partial": "*fp32", "out": "*bf16", "scale": "*fp32", "bias": "*bf16"}
    sizes = dict.fromkeys(("out_features", "size", "splits"), "i32")
    flags = {"HAS_SCALE": True, "HAS_BIAS": True, "BLOCK": 256}
    yield Variant("", sparse_linear.add_splits_kernel, {**partial, **sizes}, flags)
    yield from _combine()
    yield from _verify()


def _sparse(label: str, dtype: str, longest: int, per_word: int) -> Iterator[Variant]:
    pointers, constants = _tile(dtype, longest, per_word)
    x = _POINTER[_ACTIVATIONS[dtype]]
    ends = dict.fromkeys(("out_features", "in_features", "column_tiles"), "i32")
    if dtype in ("bf16", "int8"):
        yield Variant(label, expand.expand_kernel, {"out": x, **pointers, **ends}, constants)
    own = {"x": x, "out": x, **pointers, "bias": x, **ends, "tiles_per_split": "i32"}
    flags = {"HAS_BIAS": False, "IS_PARTIAL": False}
    launch = find("cuda", "*", "*").gemv
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    yield Variant(label, sparse_linear.gemv_kernel, own, {**constants, **flags}, options)
    yield _gemm(label, dtype, longest, per_word, block=16)


def _gemm(label: str, dtype: str, longest: int, per_word: int, *, block: int) -> Variant:
    pointers, constants = _tile(dtype, longest, per_word)
    x = _POINTER[_ACTIVATIONS[dtype]]
    sizes = ("out_features", "in_features", "column_tiles", "tiles_per_split", "num_rows")
    own = {"x": x, "out": x, **pointers, "bias": x, **dict.fromkeys(sizes, "i32")}
    flags = {"HAS_BIAS": False, "IS_PARTIAL": False, "IN_FP32": False, "BLOCK": block}
    launch = find("cuda", "*", "*").gemm
    warps = max(launch.num_warps, sparse_linear.least_warps(block))
    options = {"num_warps": warps, "num_stages": launch.num_stages}
    return Variant(label, sparse_linear.gemm_kernel, own, {**constants, **flags}, options)


def _tile(dtype: str, longest: int, per_word: int) -> tuple[dict[str, Any], dict[str, Any]]:
    pointers = {"masks": "*i32", "values": _POINTER[dtype], "starts": "*i32", "scale": "*fp32"}
    constants = {
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "LONGEST": longest,
        "PER_WORD": per_word,
        "UNIT": 16 // _ITEM_BYTES[dtype],
        "HAS_SCALE": dtype == "int8",
    }
    return pointers, constants


def _combine() -> Iterator[Variant]:
    options = {"enable_fp_fusion": False}
    best = {"best_values": "*fp32", "best_ids": "*i32"}
    noisy = {"noisy_values": "*fp32", "noisy_ids": "*i32"}
    sizes = {"width": "i32", "chunks": "i32"}
    block, chunks = {"BLOCK": combine.BLOCK}, {"CHUNKS": _CHUNKS}
    for members in (1, 3):
        given = {
            "members": ("*fp32",) * members,
            "strides": ("i32",) * members,
            "weights": "*fp32",
            "logits": "*fp32",
        }
        yield Variant(
            f"{members} members", combine.combine_kernel, {**given, **best, **sizes}, block, options
        )
    row = {
        "logits": "*fp32",
        "temperatures": "*fp32",
        "keys": "*i64",
        "is_sampled": "*i8",
        "best_values": "*fp32",
    }
    yield Variant("", combine.perturb_kernel, {**row, **noisy, **sizes}, {**block, **chunks}, options)
    own = {"is_sampled": "*i8", **best, **noisy, "tokens": "*i64", "chunks": "i32"}
    yield Variant("", combine.pick_kernel, own, chunks)


_VERIFY_TYPES = {
    **dict.fromkeys(("scores", "q", "maxima", "row_maxima", "row_sums", "scales"), "*fp32"),
    **dict.fromkeys(("sums", "ratios", "joint", "surplus", "uniforms", "residuals", "targets"), "*fp64"),
    **dict.fromkeys(("first_rows", "lengths", "drafts", "accepted", "tokens"), "*i64"),
    **dict.fromkeys(("width", "chunks", "depth"), "i32"),
}


def _verify() -> Iterator[Variant]:
    known = {"BLOCK": verify.BLOCK, "CHUNKS": _CHUNKS}
    kernels = (
        verify.row_stats_kernel,
        verify.joint_kernel,
        verify.surplus_kernel,
        verify.accept_kernel,
        verify.residual_kernel,
        verify.draw_kernel,
    )
    for kernel in kernels:
        arguments = {name: _VERIFY_TYPES[name] for name in kernel.arg_names if name in _VERIFY_TYPES}
        constants = {name: value for name, value in known.items() if name in kernel.arg_names}
        if "BY_BLOCK" not in kernel.arg_names:
            yield Variant("", kernel, arguments, constants)
            continue
        for by_block in (False, True):
            label = "block rule" if by_block else "token rule"
            yield Variant(label, kernel, arguments, {**constants, "BY_BLOCK": by_block})
