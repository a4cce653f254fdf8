"""The draft lengths of a batch against brute force."""

import itertools
import random
from collections.abc import Sequence

from paceline.server.decoding.policy import Option
from paceline.server.decoding.policy.costs import StepCosts
from paceline.server.decoding.policy.lengths import LEAST_WIN, BatchCosts, Pick, best_lengths


class _Known(StepCosts):
    """Costs without measuring; a step in the target's makes them no line."""

    def target_seconds(self, rows: int, context: float, *, drafting: bool) -> float:
        return 1 + 0.03 * rows + (0.4 if rows > 5 else 0) + (0.3 if rows > 9 else 0)

    def draft_seconds(self, forwards: float, rows: float, context: float) -> float:
        return 0.12 * forwards + 0.015 * rows


def test_lengths_of_a_batch_equal_brute_force() -> None:
    rng = random.Random(11)
    model, ngram = Option("draft", by_model=True, missing=1), Option("ngram", strength=2)
    for _ in range(200):
        picks = []
        for option in rng.choices([model, ngram, None], k=3):
            first, later = rng.uniform(0.05, 0.95), rng.uniform(0.3, 0.95)
            limit = rng.randint(0, 4) if option else 0
            picks.append(Pick(option, [first * later**j for j in range(limit)], rng.randint(1, 2)))
        costs = BatchCosts(_Known(), [50] * 3)

        def rate(lengths: Sequence[int], picks: list[Pick] = picks, costs: BatchCosts = costs) -> float:
            drafts = [(n, p) for n, p in zip(lengths, picks, strict=True) if n and p.by_model]
            forwards = max((n for n, _ in drafts), default=0)
            rows = sum(n - 1 + p.first_rows for n, p in drafts)
            tokens = 3 + sum(sum(p.gains[:n]) for n, p in zip(lengths, picks, strict=True))
            return tokens / costs.seconds(sum(lengths), forwards, rows)

        best = max(map(rate, itertools.product(*(range(len(p.gains) + 1) for p in picks))))
        lengths, plain = best_lengths(picks, costs), rate([0, 0, 0])
        # Tokens are taken by gain alone, whatever their rows in the draft cost.
        if any(lengths):
            assert rate(lengths) >= max(0.98 * best, LEAST_WIN * plain)
        else:
            assert 0.98 * best <= LEAST_WIN * plain
