"""How far a packed plan is from the fp32 plan of the same checkpoint, on tokens that both are fed (teacher-forced).

Mean KL(fp32 || plan) in nats per position, perplexity of both, and how often both would choose the same token. Runs
the CPU executor directly, a few hundred rows at a time. Memory: the reference's log-probabilities are kept as fp16,
two bytes per position and vocabulary entry. Knows nothing of files or formats; what is good enough is ``Quality.good``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources

import torch
from torch import Tensor

from paceline.kernels.cpu.executor import Executor
from paceline.kernels.cpu.library import Pool
from paceline.kernels.cpu.plan import DecoderPlan
from paceline.kernels.formats import LANES, padded

#: The bar: mean KL in nats per position, and perplexity relative to that of fp32.
MAX_KL_NATS = 0.02
MAX_PERPLEXITY_CHANGE = 0.01
#: Rows per forward: 128 rows of 150,000 logits are 78 MB.
_ROWS = 128
#: Longest stretch of text that is judged in one context.
WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Quality:
    """One plan against fp32.

    Attributes:
        kl_nats: mean over positions of KL(fp32 || plan).
        perplexity: of the plan; ``reference_perplexity`` that of fp32.
        top1_agreement: share of positions where both have the same most probable token.
    """

    kl_nats: float
    perplexity: float
    reference_perplexity: float
    top1_agreement: float
    positions: int

    @property
    def perplexity_change(self) -> float:
        """Relative to fp32: 0.01 is one per cent worse."""
        return self.perplexity / self.reference_perplexity - 1.0

    @property
    def good(self) -> bool:
        """Whether the plan meets the bar."""
        return self.kl_nats <= MAX_KL_NATS and abs(self.perplexity_change) <= MAX_PERPLEXITY_CHANGE

    def __str__(self) -> str:
        return f"KL {self.kl_nats:.4f}, perplexity {self.perplexity_change:+.2%}, top-1 {self.top1_agreement:.1%}"

    def as_dict(self) -> dict[str, float]:
        """For JSON; ``Quality(**values)`` is the way back."""
        return asdict(self)


class Judge:
    """Measures plans against one reference plan, whose log-probabilities it computes once and keeps.

    Args:
        reference: the fp32 plan; not kept.
        windows: token ids, each at least two; every window is a context of its own.
    """

    def __init__(self, reference: DecoderPlan, windows: Sequence[Sequence[int]], pool: Pool) -> None:
        self._windows, self._pool = windows, pool
        rows = self._run(reference, torch.float32, windows)
        self._expected = [logits.log_softmax(-1).half() for logits, _ in rows]

    def measure(self, plan: DecoderPlan, *, windows: int | None = None) -> Quality:
        """The plan as it is served, with K and V in bf16, on the first ``windows`` windows (None: all)."""
        sums, positions = torch.zeros(4, dtype=torch.float64), 0
        for (logits, labels), expected in zip(
            self._run(plan, torch.bfloat16, self._windows[:windows]), self._expected, strict=windows is None
        ):
            sums += compare(logits, expected.float(), labels)
            positions += len(labels)
        kl, nll, reference_nll, agreed = (sums / positions).tolist()
        return Quality(kl, math.exp(nll), math.exp(reference_nll), agreed, positions)

    def _run(
        self, plan: DecoderPlan, kv_dtype: torch.dtype, windows: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits fp32 [rows, vocab], next tokens [rows]) for all positions but each window's last, in order."""
        block = padded(max(map(len, windows)), LANES)
        size = 2 * len(plan.layers) * block * plan.kv_heads * plan.head_dim * kv_dtype.itemsize
        kv = torch.zeros(1, size, dtype=torch.uint8)
        executor = Executor(plan, self._pool, kv, kv_dtype=kv_dtype, block_tokens=block)
        for window in windows:
            for start in range(0, len(window) - 1, _ROWS):
                rows = window[start : min(start + _ROWS, len(window) - 1)]
                logits = executor.forward(rows, [(0, len(rows), start, [0])], range(len(rows)))
                yield logits, torch.tensor(window[start + 1 : start + 1 + len(rows)])


def compare(logits: Tensor, expected: Tensor, labels: Tensor) -> Tensor:
    """Sums over rows: KL(reference || plan), negative log-likelihoods of plan and reference, equal choices.

    Args:
        logits: of the plan, fp32 [rows, vocab].
        expected: log-probabilities of the reference, fp32 [rows, vocab].
        labels: the next tokens, int64 [rows].

    Returns:
        fp64 [4].
    """
    got = logits.log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(dtype=torch.float64)
    nll = [-rows.gather(1, labels[:, None]).sum(dtype=torch.float64) for rows in (got, expected)]
    agreed = (got.argmax(-1) == expected.argmax(-1)).sum().double()
    return torch.stack([kl, *nll, agreed])


def split(tokens: Sequence[int], length: int = WINDOW_TOKENS) -> list[list[int]]:
    """Windows of ``length`` tokens; a rest too short to judge is dropped."""
    windows = [list(tokens[at : at + length]) for at in range(0, len(tokens), length)]
    return [window for window in windows if len(window) > 1]


@cache
def calibration_text() -> str:
    """Prose, dialogue, code, figures and some other languages, written for this purpose."""
    return resources.files("paceline.server.models").joinpath("calibration.txt").read_text(encoding="utf-8")
