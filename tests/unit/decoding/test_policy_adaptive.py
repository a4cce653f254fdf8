"""The adaptive policy in a simulated engine: times are formulas, acceptance a coin."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from paceline.server.decoding.policy import AdaptivePolicy, Candidate, Decision, History, Option, StepWork
from paceline.server.decoding.policy.costs import StepCosts
from paceline.server.decoding.policy.history import Reason
from paceline.server.decoding.policy.probes import ProbeBudget
from paceline.server.decoding.policy.rest import LONGEST_REST_STEPS


@dataclass
class Simulation:
    """One sequence (or ``batch`` alike) over a policy; seconds are in units of a target forward of one row.

    Attributes:
        alpha: chance per draft token of each source.
        draft_cost: one forward of the draft model. ``row_cost``: one more row of the target.
        missing: tokens the draft lacks; kept here as the engine does.
        asked: steps that the policy did not rest.
    """

    policy: AdaptivePolicy
    alpha: dict[str, float]
    draft_cost: float = 0.1
    row_cost: float = 0.02
    catch_up_cost: float = 0.001
    batch: int = 1
    limit: int = 8
    context: int = 100
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    seconds: float = 0.0
    lost: float = 0.0

    def __post_init__(self) -> None:
        self.histories = [History() for _ in range(self.batch)]
        self.missing = [self.context] * self.batch
        self.generated = self.asked = 0

    def options(self, index: int) -> list[Option]:
        model = {"draft": Option("draft", by_model=True, missing=self.missing[index])}
        return [model.get(name, Option(name, strength=3)) for name in self.alpha]

    def step(self) -> list[Decision]:
        decisions = self.policy.resting(self.histories)
        if decisions is None:
            self.asked += 1
            decisions = self.policy.decide(
                [
                    Candidate(h, self.options(i), self.limit, self.context, 256)
                    for i, h in enumerate(self.histories)
                ]
            )
        accepted = [self._accepted(d) for d in decisions]
        work = self._work(decisions)
        for i, (decision, count) in enumerate(zip(decisions, accepted, strict=True)):
            by_model = decision.option is not None and decision.option.by_model
            self.missing[i] = 1 if by_model else self.missing[i] + count + 1
            if decision.option is not None:
                self.policy.on_block(self.histories[i], decision.option, decision.length, count)
        self.policy.on_step(work)
        self.seconds += work.target_seconds + work.draft_seconds
        self.generated += sum(accepted) + self.batch
        return decisions

    def run(self, steps: int) -> list[list[Decision]]:
        return [self.step() for _ in range(steps)]

    def _accepted(self, decision: Decision) -> int:
        if decision.option is None:
            return 0
        alpha, count = self.alpha[decision.option.source], 0
        while count < decision.length and self.rng.random() < alpha:
            count += 1
        return count

    def _work(self, decisions: Sequence[Decision]) -> StepWork:
        by_model = [(i, d) for i, d in enumerate(decisions) if d.option is not None and d.option.by_model]
        forwards = max((d.length for _, d in by_model), default=0)
        behind = sum(self.missing[i] for i, _ in by_model if self.missing[i] > 8)
        draft_rows = sum(d.length - 1 + self.missing[i] for i, d in by_model)
        rows = self.batch + sum(d.length for d in decisions)
        return StepWork(
            rows=rows,
            row_context=rows * self.context,
            decodes_only=True,
            target_seconds=1 + self.row_cost * (rows - 1),
            draft_forwards=forwards,
            draft_rows=draft_rows,
            draft_row_context=draft_rows * self.context,
            catch_up_rows=behind,
            draft_seconds=self.draft_cost * forwards + self.catch_up_cost * behind,
        )


def best_length(alpha: float, draft_cost: float, row_cost: float, limit: int) -> tuple[int, list[float]]:
    """By brute force: the length of most tokens per second for a lone sequence, and the rate of each length."""
    rates = [
        sum(alpha**j for j in range(length + 1)) / (1 + length * (draft_cost + row_cost))
        for length in range(limit + 1)
    ]
    return rates.index(max(rates)), rates


@pytest.mark.parametrize("draft_cost", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.8, 0.95])
def test_the_length_is_as_good_as_the_best_one(alpha: float, draft_cost: float) -> None:
    simulation = Simulation(AdaptivePolicy(), {"draft": alpha}, draft_cost)
    simulation.run(300)
    lengths = [decisions[0].length for decisions in simulation.run(400)]
    best, rates = best_length(alpha, draft_cost, simulation.row_cost, simulation.limit)
    assert sum(rates[n] for n in lengths) / len(lengths) > 0.93 * rates[best]
    assert min(lengths) >= 0
    assert max(lengths) <= simulation.limit


def test_a_hopeless_draft_is_left_alone_and_costs_next_to_nothing() -> None:
    simulation = Simulation(AdaptivePolicy(), {"draft": 0.02}, draft_cost=0.3)
    simulation.run(200)
    before = simulation.seconds, simulation.generated
    decisions = [d[0] for d in simulation.run(5000)]
    drafted = [d for d in decisions if d.length]
    assert 0 < len(drafted) < 200
    assert all(d.length == 1 for d in drafted)
    lost = (simulation.seconds - before[0]) - (simulation.generated - before[1])
    assert lost < 0.01 * 5000
    assert {d.reason for d in decisions if not d.length} <= {"low_acceptance", "catch_up"}


@pytest.mark.parametrize(("sequences", "share"), [(1, 0.01), (16, 0.004)])
def test_probes_lose_no_more_than_their_share(sequences: int, share: float) -> None:
    budget, lost = ProbeBudget(), 0.0
    for _ in range(5000):
        budget.earn(1.0, sequences)
        lost += 0.5 if budget.grant([(0.5, 0)]) is not None else 0.0
    assert share * 5000 <= lost <= share * 5000 + 5  # the first credit is four steps


def test_probes_back_off() -> None:
    simulation = Simulation(AdaptivePolicy(), {"ngram": 0.0}, row_cost=0.5)
    simulation.run(100)
    at = [i for i, d in enumerate(simulation.run(6000)) if d[0].length]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert 2 <= len(at) <= 20
    assert gaps[-1] > 2 * gaps[0]


@pytest.mark.parametrize("source", ["draft", "ngram"])
def test_drafting_starts_again_when_acceptance_rises(source: str) -> None:
    simulation = Simulation(AdaptivePolicy(), {source: 0.02}, draft_cost=0.15, row_cost=0.1)
    simulation.run(400)
    assert sum(d[0].length > 0 for d in simulation.run(50)) < 15
    simulation.alpha[source] = 0.9
    simulation.run(4000)
    lengths = [d[0].length for d in simulation.run(100)]
    assert sum(lengths) / len(lengths) > 2


def test_the_better_source_is_chosen() -> None:
    for alphas, better in (({"draft": 0.9, "ngram": 0.2}, "draft"), ({"draft": 0.6, "ngram": 0.9}, "ngram")):
        simulation = Simulation(AdaptivePolicy(), dict(alphas), draft_cost=0.1)
        simulation.run(300)
        sources = [d[0].option.source for d in simulation.run(200) if d[0].option is not None]
        assert sources.count(better) > 0.9 * len(sources) > 0


def test_each_sequence_has_an_estimate_of_its_own() -> None:
    policy = AdaptivePolicy()
    good = Simulation(policy, {"draft": 0.9}, draft_cost=0.25)
    bad = Simulation(policy, {"draft": 0.05}, draft_cost=0.25)
    for _ in range(300):
        good.step()
        bad.step()
    assert sum(good.step()[0].length for _ in range(100)) > 200
    assert sum(bad.step()[0].length for _ in range(100)) < 30


def test_a_crowd_whose_rows_are_dear_is_not_drafted_for() -> None:
    crowd = Simulation(AdaptivePolicy(), {"ngram": 0.5}, row_cost=0.5, batch=16)
    crowd.run(100)
    decisions = [d for step in crowd.run(128) for d in step]
    assert 0 < sum(d.length for d in decisions) < 3 * 16  # each is probed twice
    alone = Simulation(AdaptivePolicy(), {"ngram": 0.5}, row_cost=0.05)
    alone.run(100)
    assert sum(d[0].length for d in alone.run(50)) > 50


def test_batch_cost_is_told_from_low_acceptance() -> None:
    def reason(alpha: float) -> str | None:
        policy = AdaptivePolicy()
        simulation = Simulation(policy, {"ngram": alpha}, batch=4)
        simulation.run(60)
        policy._costs = _Crowded()
        return simulation.run(20)[-1][-1].reason  # the last of them may be a rest after an earlier one

    assert reason(0.5) == "batch_cost"
    assert reason(0.03) == "low_acceptance"


class _Crowded(StepCosts):
    """A second row is cheap, one more beside four as dear as a step."""

    def target_seconds(self, rows: int, context: float, *, drafting: bool) -> float:
        return 1 + 0.1 * (rows - 1) + max(0, rows - 4)

    def draft_seconds(self, forwards: float, rows: float, context: float) -> float:
        return 0.0

    def observe(self, work: StepWork) -> None:
        pass


def test_catching_up_must_be_worth_it() -> None:
    def decision(horizon: int) -> Decision:
        policy = AdaptivePolicy()
        Simulation(policy, {"draft": 0.8}, draft_cost=0.2, catch_up_cost=0.02).run(100)
        option = Option("draft", by_model=True, missing=2000)
        return policy.decide([Candidate(History(), [option], 8, 2000, horizon)])[0]

    assert decision(10).reason == "catch_up"
    assert decision(1000).length > 0


def test_without_options_or_room_nothing_is_wanted() -> None:
    policy = AdaptivePolicy()
    assert policy.decide([]) == []
    nothing, last = Candidate(History(), [], 4, 10, 50), Candidate(History(), [Option("ngram")], 0, 10, 1)
    assert policy.decide([nothing]) == [Decision(reason="no_match")]
    assert policy.decide([nothing, last, last])[1:] == [Decision(), Decision()]


def test_a_crowd_in_which_nobody_drafts_is_asked_rarely() -> None:
    simulation = Simulation(AdaptivePolicy(), {"draft": 0.5}, row_cost=0.5, batch=16)
    simulation.run(200)
    asked = simulation.asked
    decisions = simulation.run(400)
    assert 400 // 33 <= simulation.asked - asked <= 20
    reasons = [decision.reason for step in decisions for decision in step if not decision.length]
    assert set(reasons) <= {"batch_cost", "low_acceptance", "catch_up"}


def test_few_sequences_are_asked_in_every_step() -> None:
    simulation = Simulation(AdaptivePolicy(), {"draft": 0.0}, batch=3)
    simulation.run(100)
    assert simulation.asked == 100


def test_in_a_crowd_n_grams_are_tried_while_the_draft_model_rests() -> None:
    simulation = Simulation(AdaptivePolicy(), {"draft": 0.1, "ngram": 0.9}, draft_cost=2.0, batch=16)
    simulation.run(100)
    late = [decision for step in simulation.run(200) for decision in step]
    assert sum(decision.option == Option("ngram", strength=3) for decision in late) > 0.95 * len(late)


def test_in_a_crowd_that_uses_no_draft_model_a_new_one_waits_for_the_end_of_the_rest() -> None:
    simulation = Simulation(AdaptivePolicy(), {"draft": 0.02, "ngram": 0.9}, draft_cost=0.05, batch=16)
    simulation.run(100)
    policy, histories = simulation.policy, simulation.histories
    hopeful, match = Option("other", by_model=True, missing=1), Option("ngram", strength=3)
    waited: list[Reason | None] = []
    while True:
        assert policy.resting(histories) is None
        matched = [Candidate(h, [match], 8, 100, 256) for h in histories[1:]]
        first, *others = policy.decide([Candidate(histories[0], [hopeful], 8, 100, 256), *matched])
        assert all(decision.option == match for decision in others)
        if first.length:
            break
        waited.append(first.reason)
    assert 1 <= len(waited) <= LONGEST_REST_STEPS
    assert set(waited) == {"batch_cost"}
