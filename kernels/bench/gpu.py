"""``make bench-gpu``: the kernels on a CUDA GPU beside cuBLAS, torch's own 2:4 and the bandwidth ceiling.

Checks first, then times. Prints the ceiling first: bytes that are needed over the bandwidth that a copy reaches here.
Then a line per layer, format and number of rows T, lines for combining and verifying, and a JSON line last. Without a
GPU it says so and ends well.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.kernels import reference, reference_sampling
from paceline.kernels.formats import Pattern, SparseTiles
from paceline.kernels.gpu.runtime import lazy
from paceline.kernels.gpu.shapes import LAYERS, random_tiles
from paceline.kernels.gpu.table import Plan, device_name, format_name, plan_for
from paceline.kernels.gpu.tune import Timer, do_bench

ROWS = (1, 2, 4, 8, 16)
_KINDS = (
    (Pattern(), 0.0),
    (Pattern(), 0.5),
    (Pattern(), 0.75),
    (Pattern(), 0.9),
    (Pattern(16, 32), 0.5),
    (Pattern(2, 4), 0.5),
)
_DTYPES = ("bf16", "int8")
_COPY_BYTES = 1 << 28
#: Qwen 2.5's.
_VOCABULARY = 151_936
#: bf16 results of up to 28,672 terms: half a unit in the last place of the greatest result, and fp32 sums.
_TOLERANCE = 2.0**-7


@dataclass(frozen=True, slots=True)
class Row:
    """One product; times in milliseconds.

    Attributes:
        dense_ms: cuBLAS, bf16.
        ours_ms: as the table chooses; ``is_sparse`` says what that was.
        sparse_ms: expanding on chip in any case.
        torch_2_4_ms: torch's semi-structured product, None where there is none for this pattern or machine.
        ceiling_ms: the format's bytes at the bandwidth of a copy.
    """

    layer: str
    format: str
    sparsity: float
    rows: int
    dense_ms: float
    ours_ms: float
    sparse_ms: float
    is_sparse: bool
    torch_2_4_ms: float | None
    ceiling_ms: float

    def __str__(self) -> str:
        other = "      -" if self.torch_2_4_ms is None else f"{self.torch_2_4_ms:7.4f}"
        share = self.ceiling_ms / self.ours_ms
        return (
            f"{self.layer:18} {self.format:14} {self.sparsity:4.0%} T={self.rows:<3} dense {self.dense_ms:7.4f}  "
            f"ours {self.ours_ms:7.4f} ({'sparse' if self.is_sparse else 'dense '})  sparse {self.sparse_ms:7.4f}  "
            f"torch 2:4 {other}  ceiling {self.ceiling_ms:7.4f}  share {share:4.0%}  "
            f"speed-up {self.dense_ms / self.ours_ms:5.2f}"
        )


def bandwidth(device: torch.device, time_ms: Timer) -> float:
    """Bytes per second that a large copy moves, read and written."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (time_ms(lambda: target.copy_(source)) / 1000)


def measure(
    device: torch.device, layers: Mapping[str, tuple[int, int]], bytes_per_second: float, time_ms: Timer
) -> Iterator[Row]:
    """Check and time every layer, format and number of rows.

    Raises:
        ValueError: a product is wrong.
    """
    sparse_linear = lazy("sparse_linear", "sparse_linear", device.type)
    for (layer, shape), (pattern, sparsity), dtype in product(layers.items(), _KINDS, _DTYPES):
        tiles = random_tiles(shape, pattern, sparsity, dtype, device)
        dense = tiles.to_dense(torch.bfloat16)
        for rows in ROWS:
            x = torch.randn(rows, shape[1], device=device).to(torch.bfloat16)
            plan = plan_for(tiles, rows)
            sparse = Plan(True, plan.num_warps, plan.num_stages, plan.splits)
            for way in {plan, sparse}:
                _check(x, tiles, sparse_linear(x, tiles, None, way))
            yield Row(
                layer,
                format_name(tiles),
                sparsity,
                rows,
                time_ms(partial(F.linear, x, dense)),
                time_ms(partial(sparse_linear, x, tiles, None, plan)),
                time_ms(partial(sparse_linear, x, tiles, None, sparse)),
                plan.is_sparse,
                _torch_2_4(x, dense, pattern, time_ms),
                tiles.num_bytes / bytes_per_second * 1000,
            )


def _check(x: Tensor, tiles: SparseTiles, y: Tensor) -> None:
    exact = reference.sparse_linear(x.float(), tiles, None)
    if not ((y.float() - exact).abs() <= _TOLERANCE * exact.abs().max()).all():
        raise ValueError(f"{format_name(tiles)} {tiles.out_features}x{tiles.in_features}: a wrong product")


def _torch_2_4(x: Tensor, dense: Tensor, pattern: Pattern, time_ms: Timer) -> float | None:
    """torch's 2:4 product with the same weight; None for other patterns, and where torch has none."""
    if pattern != Pattern(2, 4) or x.device.type != "cuda":
        return None
    try:
        packed = torch.sparse.to_sparse_semi_structured(dense)
        call = partial(F.linear, x, packed)
        call()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        sys.stderr.write(f"torch 2:4, {list(dense.shape)}: {str(error).splitlines()[0]}\n")
        return None
    return time_ms(call)


@dataclass(frozen=True, slots=True)
class Choosing:
    """Combining or verifying; times in milliseconds."""

    name: str
    ours_ms: float
    reference_ms: float
    ceiling_ms: float

    def __str__(self) -> str:
        return (
            f"{self.name:34} ours {self.ours_ms:7.4f}  reference {self.reference_ms:7.4f}  "
            f"ceiling {self.ceiling_ms:7.4f}"
        )


def measure_choosing(
    device: torch.device, width: int, bytes_per_second: float, time_ms: Timer
) -> Iterator[Choosing]:
    """Check and time what comes after the forward: three members of 8 rows, and 8 blocks of 5 draft tokens.

    Args:
        width: of the vocabulary.

    Raises:
        ValueError: a result is wrong.
    """
    generator = torch.Generator(device).manual_seed(0)
    members = [torch.randn(8, width, generator=generator, device=device) for _ in range(3)]
    keys = torch.arange(8, device=device)
    drawn = (torch.ones(8, 3, device=device), torch.full((8,), 0.7, device=device), keys, keys >= 0)
    yield _choosing("combine", (members, *drawn), {}, 4 * 8 * width * 4, bytes_per_second, time_ms)
    scores = torch.randn(48, width, generator=generator, device=device)
    q = torch.randn(8, 5, width, generator=generator, device=device).softmax(-1)
    drafts = torch.multinomial(q.view(40, width), 1, generator=generator).view(8, 5)
    uniforms = torch.rand(8, 6, dtype=torch.float64, generator=generator, device=device)
    given = (scores, keys * 6, drafts, torch.full_like(keys, 5), q, uniforms)
    for by_block in (False, True):
        yield _choosing(
            "verify", given, {"by_block": by_block}, (48 + 40) * width * 4, bytes_per_second, time_ms
        )


def _choosing(
    name: str,
    given: tuple[Any, ...],
    options: dict[str, Any],
    needed_bytes: int,
    bytes_per_second: float,
    time_ms: Timer,
) -> Choosing:
    ours = partial(lazy(name, name, given[-1].device.type), *given, **options)
    slow = partial(getattr(reference_sampling, name), *given, **options)
    if not torch.equal(ours()[0], slow()[0]):
        raise ValueError(f"{name} {options}: not the tokens of the reference")
    label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
    return Choosing(label, time_ms(ours), time_ms(slow), needed_bytes / bytes_per_second * 1000)


def main() -> int:
    """Bench on the first GPU; 0 also where there is none."""
    if not torch.cuda.is_available():
        sys.stdout.write("bench-gpu: no CUDA GPU here, nothing was timed\n")
        return 0
    device = torch.device("cuda")
    speed = bandwidth(device, do_bench)
    sys.stdout.write(
        f"{device_name(device)}: a copy moves {speed / 1e9:.0f} GB/s, the ceiling of everything below\n"
    )
    rows: list[Row | Choosing] = []
    products = measure(device, LAYERS, speed, do_bench)
    for row in chain[Row | Choosing](products, measure_choosing(device, _VOCABULARY, speed, do_bench)):
        rows.append(row)
        sys.stdout.write(f"{row}\n")
    told = {"device": device_name(device), "bytes_per_second": speed, "rows": [asdict(row) for row in rows]}
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
