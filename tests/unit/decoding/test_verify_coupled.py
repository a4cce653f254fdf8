"""``verify`` where no randomness is left: greedy and seeded choices, ragged and mixed batches."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from paceline.server.decoding import verify as verify_module
from paceline.server.decoding.rows import Row
from paceline.server.decoding.sampler import draw, process
from paceline.server.decoding.verify import DraftBlock, Rule, Verdict, verify
from paceline.server.engine.request import SamplingParams

torch.set_num_threads(1)

VOCAB = 11
LENGTH = 40
PROMPT = (3, 1)


class Model:
    """Logits that depend on the last two tokens, processed with parameters that depend on all of them."""

    def __init__(self, seed: int, sampling: SamplingParams, choice: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCAB, VOCAB, VOCAB, generator=generator) * 2
        self.sampling = sampling
        self.choice = choice

    def rows(self, output: Sequence[int], drafts: Sequence[int]) -> list[Row]:
        prefixes = [(*output, *drafts[:j]) for j in range(len(drafts) + 1)]
        return [
            Row(self.sampling, PROMPT, prefix, (0,), self.choice, len(PROMPT) + len(prefix))
            for prefix in prefixes
        ]

    def scores(self, rows: Sequence[Row]) -> torch.Tensor:
        contexts = [(*PROMPT, *row.output_ids)[-2:] for row in rows]
        return process(torch.stack([self.table[a, b] for a, b in contexts]), rows)


Drafter = Callable[[Model, list[int]], tuple[int, ...]]


def nothing(_model: Model, _output: list[int]) -> tuple[int, ...]:
    return ()


def constant(_model: Model, _output: list[int]) -> tuple[int, ...]:
    return (4, 4, 4)


def noise(_model: Model, output: list[int]) -> tuple[int, ...]:
    return tuple((len(output) * 7 + j * 3) % VOCAB for j in range(len(output) % 5))


def oracle(model: Model, output: list[int]) -> tuple[int, ...]:
    """Drafts what the target will say, with the same noise: everything is accepted."""
    drafts: list[int] = []
    for _ in range(4):
        rows = model.rows([*output, *drafts], ())
        drafts.append(int(draw(model.scores(rows), rows, torch.Generator())))
    return tuple(drafts)


def half_oracle(model: Model, output: list[int]) -> tuple[int, ...]:
    first, second, third, _ = oracle(model, output)
    return (first, second, (third + 1) % VOCAB, 0)


DRAFTERS: list[Drafter] = [nothing, constant, noise, oracle, half_oracle]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 20},
    {"seed": 12},
    {"seed": -3, "temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.4, "min_tokens": 10},
]


def generate(models: Sequence[Model], drafters: Sequence[Drafter]) -> tuple[list[list[int]], int]:
    """Run the choices together until each has LENGTH tokens; the outputs and the accepted drafts."""
    outputs: list[list[int]] = [[] for _ in models]
    n_accepted = 0
    while min(map(len, outputs)) < LENGTH:
        drafts = [drafter(model, out) for model, drafter, out in zip(models, drafters, outputs, strict=True)]
        rows = [model.rows(out, ids) for model, out, ids in zip(models, outputs, drafts, strict=True)]
        scores = torch.cat([model.scores(part) for model, part in zip(models, rows, strict=True)])
        flat = [row for part in rows for row in part]
        verdicts = verify(scores, flat, [DraftBlock(ids) for ids in drafts], "block", torch.Generator())
        for out, ids, verdict in zip(outputs, drafts, verdicts, strict=True):
            out += [*ids[: verdict.accepted], verdict.token_id]
            n_accepted += verdict.accepted
    return [out[:LENGTH] for out in outputs], n_accepted


@pytest.mark.parametrize("params", PARAMS)
def test_text_does_not_depend_on_the_draft_or_on_the_crowd(params: dict[str, Any]) -> None:
    model = Model(0, SamplingParams(**params))
    (plain,), _ = generate([model], [nothing])
    assert len(set(plain)) > 3
    for drafter in DRAFTERS:
        (alone,), n_accepted = generate([model], [drafter])
        assert alone == plain
        if drafter is oracle:
            assert n_accepted >= LENGTH * 4 // 5
    crowd = [model, Model(1, SamplingParams()), Model(2, SamplingParams(temperature=0.0)), model]
    together, _ = generate(crowd, [half_oracle, noise, oracle, constant])
    assert together[0] == together[3] == plain


def test_choices_of_one_seed_differ() -> None:
    outputs, _ = generate([Model(0, SamplingParams(seed=1), choice) for choice in range(3)], [noise] * 3)
    assert len({tuple(output) for output in outputs}) == 3


def test_greedy_batch_uses_neither_softmax_nor_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a greedy batch needs only argmax")

    for name in ("verify_token", "verify_block", "random_uniforms", "sample"):
        monkeypatch.setattr(verify_module, name, forbidden)
    for name in ("softmax", "exp", "exp_", "cumsum"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    scores = torch.eye(5)
    row = Row(SamplingParams(temperature=0.0, top_p=0.5), (), (), (), 0, 0)
    blocks = [DraftBlock((0, 1)), DraftBlock(()), DraftBlock((1,))]
    scores = torch.cat([scores[[0, 1, 2]], scores[[3]], scores[[4, 0]]])
    verdicts = verify(scores, [row] * 6, blocks, "token", torch.Generator())
    assert verdicts == [Verdict(2, 2), Verdict(0, 3), Verdict(0, 4)]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_each_kind_of_block_gets_its_own_verdict(rule: Any) -> None:
    """One-hot scores leave one possible verdict each, whatever the order and lengths of the blocks."""

    def certain(*tokens: int) -> torch.Tensor:
        return torch.full((len(tokens), VOCAB), -torch.inf).scatter_(
            1, torch.tensor(tokens).unsqueeze(1), 0.0
        )

    unseeded, seeded, greedy = SamplingParams(), SamplingParams(seed=1), SamplingParams(temperature=0.0)
    spread = torch.full((2, VOCAB), 1 / VOCAB)
    cases = [
        (unseeded, DraftBlock((1, 2)), certain(1, 2, 3), Verdict(2, 3)),
        (greedy, DraftBlock((1, 2, 5)), certain(1, 2, 6, 7), Verdict(2, 6)),
        (unseeded, DraftBlock(()), certain(8), Verdict(0, 8)),
        (unseeded, DraftBlock((4, 5), spread), certain(6, 5, 1), Verdict(0, 6)),
        (seeded, DraftBlock((9,), spread[:1]), certain(9, 10), Verdict(1, 10)),
        (unseeded, DraftBlock((4, 5), spread), certain(4, 5, 1), Verdict(2, 1)),
        (seeded, DraftBlock(()), certain(2), Verdict(0, 2)),
        (unseeded, DraftBlock((7, 7, 7)), certain(7, 7, 0, 0), Verdict(2, 0)),
    ]
    for order in (cases, cases[::-1], cases[3:] + cases[:3]):
        scores = torch.cat([case[2] for case in order])
        rows = [Row(sampling, (), (), (), 0, 0) for sampling, _, s, _ in order for _ in s]
        verdicts = verify(scores, rows, [case[1] for case in order], rule, torch.Generator())
        assert verdicts == [case[3] for case in order]
    assert verify(torch.zeros(0, VOCAB), [], [], rule, torch.Generator()) == []


def test_a_whole_accepted_block_yields_one_token_more() -> None:
    scores = torch.zeros(4, VOCAB)
    rows = [Row(SamplingParams(), (), (), (), 0, 0)] * 4
    probs = torch.full((3, VOCAB), 1 / VOCAB)
    tokens = set()
    generator = torch.Generator().manual_seed(0)
    rules: tuple[Rule, Rule] = ("token", "block")
    for rule in rules * 100:
        [verdict] = verify(scores, rows, [DraftBlock((1, 2, 3), probs)], rule, generator)
        assert verdict.accepted == 3
        tokens.add(verdict.token_id)
    assert tokens == set(range(VOCAB))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_q_of_some_ids_is_zero_for_all_others(rule: Rule) -> None:
    """A narrow q with its ids gives the verdicts of the same q written out over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30 * 4, VOCAB, generator=generator)
    rows = [Row(SamplingParams(), (), (), (), 0, 0)] * len(scores)
    columns = torch.tensor([1, 4, 5, 8])
    narrow, whole, first = [], [], []
    for _ in range(30):
        q = torch.randn(3, 4, generator=generator).softmax(-1)
        drawn = tuple(torch.multinomial(q, 1, generator=generator).flatten().tolist())
        narrow.append(DraftBlock(tuple(int(columns[i]) for i in drawn), q, columns))
        whole.append(DraftBlock(narrow[-1].token_ids, torch.zeros(3, VOCAB).index_copy(1, columns, q)))
        first.append(DraftBlock(drawn, q))
    verdicts = [
        verify(scores, rows, blocks, rule, torch.Generator().manual_seed(1))
        for blocks in (narrow, whole, first)
    ]
    assert verdicts[0] == verdicts[1] != verdicts[2]
    assert len({verdict.accepted for verdict in verdicts[0]}) > 2


def test_layout_that_does_not_fit_is_our_bug() -> None:
    row = Row(SamplingParams(), (), (), (), 0, 0)
    with pytest.raises(AssertionError):
        verify(torch.zeros(2, VOCAB), [row] * 2, [DraftBlock((1, 2))], "block", torch.Generator())
    with pytest.raises(AssertionError):
        verify(
            torch.zeros(2, VOCAB),
            [row] * 2,
            [DraftBlock((1,), torch.zeros(2, VOCAB))],
            "block",
            torch.Generator(),
        )


def test_coupled_acceptance_reaches_its_bound() -> None:
    """Drafting with the same noise accepts at least (1 - TVD) / (1 + TVD) (2408.07978)."""
    n = 20_000
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(VOCAB, generator=generator)
    draft = target + 0.7 * torch.randn(VOCAB, generator=generator)
    rows = [Row(SamplingParams(seed=4), (), (), (), 0, position) for position in range(n)]
    chosen, drafted = (draw(x.expand(n, -1), rows, generator) for x in (target, draft))
    tvd = 0.5 * (target.softmax(-1) - draft.softmax(-1)).abs().sum()
    assert (chosen == drafted).double().mean() >= (1 - tvd) / (1 + tvd)
    assert (chosen == drafted).double().mean() <= 1 - tvd + 0.01
