"""Steered models through ``Engine.step``: the arithmetic against transformers in float64, and what must not change it.

Members have prompts of their own, drafts, chunked prefill, a warm prefix cache, preemption and neighbours.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import Recorder, ids, request, run, submit, tiny_engine, tokens
from steered import FORMULAS, Oracle, pair, runners, steered_spec, watch
from tiny import EOS_ID

from paceline.server.engine.request import Request, SpeculationParams, SteeringParams
from paceline.server.errors import ArtifactError, ConfigError, ContextLengthError, InvalidRequestError

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def expert(tiny_checkpoint) -> Path:
    return Path(tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1))


@pytest.fixture(scope="session")
def anti(tiny_checkpoint) -> Path:
    return Path(tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1, perturb=0.4))


def prompts(count: int = 6, longest: int = 50, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 300) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def steered(prompt: list[int], strengths: dict[str, float | None], **extra: Any) -> Request:
    own = extra.pop("own_prompts", ())
    made = request(prompt, **extra)
    return Request(
        made.id,
        "m",
        made.prompt_ids,
        made.sampling,
        made.speculation,
        steering=SteeringParams(strengths, own),
    )


def distribution(events: Any) -> list[dict[int, float]]:
    """Log-probabilities of the tokens listed at each generated position."""
    return [dict(entry.top) for event in events for entry in event.logprobs or ()]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


@pytest.mark.parametrize(
    ("mode", "strength"), [("proxy", 1.0), ("proxy", 2.3), ("amplify", 0.6), ("amplify", 1.5), ("cfg", 0.8)]
)
def test_logits_are_those_of_a_float64_computation(mode, strength, target, expert, anti, oracle):
    """Of all positions, prompt and output, and greedy text is that of a plain loop over the three models."""
    key = {"beta" if mode == "amplify" else "alpha": strength}
    own = pair("p", anti, None if mode == "cfg" else expert, mode=mode, **key)
    engine = tiny_engine(steered_spec(target, own))
    prompt = prompts()[2]
    [[events]] = run(engine, request(prompt, logprobs=300, prompt_logprobs=300, max_tokens=12))

    def formula(m, e, a):
        return FORMULAS[mode](m, e, a, strength)

    members = {target: prompt, expert: prompt, anti: prompt}
    assert ids(events) == oracle.greedy(formula, members, 12, EOS_ID)
    text = [*prompt, *ids(events)]
    expected = formula(*(oracle.logits(path, text) for path in members))
    said = [dict(entry.top) for entry in (events[0].prompt_logprobs or ())[1:]] + distribution(events)
    for position, got in enumerate(said):
        want = log_softmax(expected[position])
        assert len(got) == 300
        assert max(abs(got[token] - want[token]) for token in got) < 2e-3, position


def test_pairs_add_up_and_share_members(target, expert, anti, tiny_checkpoint, oracle):
    """Two experts over one anti-expert: an interpolation, in three members beside the base."""
    other = tiny_checkpoint("qwen3", seed=8, num_hidden_layers=1)
    engine = tiny_engine(
        steered_spec(target, pair("a", anti, expert, alpha=0.7), pair("b", anti, other, alpha=0.3))
    )
    assert len(runners(engine)) == 4

    def formula(m, e, o, a):
        return m + 0.7 * (e - a) + 0.3 * (o - a)

    for prompt in prompts(3):
        members = dict.fromkeys((target, expert, other, anti), prompt)
        assert tokens(engine, request(prompt)) == [oracle.greedy(formula, members, 24, EOS_ID)]
    only_b = [
        oracle.greedy(
            lambda m, o, a: m + 1.2 * (o - a), dict.fromkeys((target, other, anti), prompt), 24, EOS_ID
        )
    ]
    assert tokens(engine, steered(prompt, {"a": None, "b": 1.2})) == only_b


@pytest.mark.parametrize("draft", ["expert", "anti", "ngram"])
@pytest.mark.parametrize("length", [1, 4])
def test_speculation_changes_nothing(draft, length, target, expert, anti):
    source = {"expert": "expert", "anti": anti, "ngram": "ngram"}[draft]
    own = pair("p", anti, expert, alpha=1.4)
    recorder = Recorder()
    engine = tiny_engine(steered_spec(target, own, draft=source, max_draft_tokens=length), observer=recorder)
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 40},
        {"logit_bias": {17: 3.0}},
    ]
    asked = [(prompt, kinds[i % 3]) for i, prompt in enumerate(prompts())]
    plain = [
        tokens(engine, request(p, speculation=SpeculationParams(enabled=False), **kind))[0]
        for p, kind in asked
    ]
    assert not any(step.drafted_per_block for step in recorder.steps)
    assert tokens(engine, *(request(p, **kind) for p, kind in asked)) == plain
    drafted = sum(n for step in recorder.steps for n in step.drafted_per_block)
    if draft != "ngram":
        assert drafted > 20
    assert engine.kv_usage() == 0


def test_members_with_prompts_of_their_own(target, expert, anti, oracle):
    """Longer and shorter ones than the target's, in one chunk and in many, alone and beside others."""
    own = pair("p", anti, expert, alpha=1.1)
    texts = prompts(9, longest=70)
    triples = [texts[i : i + 3] for i in range(0, 9, 3)]

    def formula(m, e, a):
        return m + 1.1 * (e - a)

    wanted = [
        oracle.greedy(formula, dict(zip((target, expert, anti), triple, strict=True)), 16, EOS_ID)
        for triple in triples
    ]
    asked = [steered(base, {}, own_prompts=(tuple(e), tuple(a)), max_tokens=16) for base, e, a in triples]
    for budget in (512, 7):
        for draft in (None, "expert"):
            engine = tiny_engine(steered_spec(target, own, draft=draft), max_batch_tokens=budget)
            assert tokens(engine, *asked) == wanted
            assert [tokens(engine, one)[0] for one in asked] == wanted  # the prefix cache is warm now
            assert engine.kv_usage() == 0


def test_strength_zero_is_exactly_the_base_and_runs_no_member(target, expert, anti):
    own = pair("p", anti, expert, alpha=1.5)
    engine = tiny_engine(steered_spec(target, own), tiny_spec_of_the_base(target))
    prompt = prompts()[1]
    plain = Request("plain", "base", tuple(prompt), request(prompt, logprobs=5).sampling)
    [[base]] = run(engine, plain)
    calls = [watch(runner) for runner in runners(engine)[1:]]
    switched_off: list[dict[str, float | None]] = [{"p": None}, {"p": 0.0}]
    for off in switched_off:
        [[events]] = run(engine, steered(prompt, off, logprobs=5))
        assert [e.logprobs for e in events] == [e.logprobs for e in base]  # bit for bit
    assert calls == [[], []]
    [[events]] = run(engine, steered(prompt, {}, logprobs=5))
    assert all(calls)
    assert ids(events) != ids(base)


def tiny_spec_of_the_base(target: Path) -> Any:
    return steered_spec(target, name="base")


def test_the_expert_drafts_without_running_anything_twice(target, expert, anti):
    """Rows of the expert: the prompt once, then one per committed or rejected draft token and one per step."""
    recorder = Recorder()
    engine = tiny_engine(
        steered_spec(target, pair("p", anti, expert, alpha=1.0), draft="expert", max_draft_tokens=3),
        observer=recorder,
        prefix_caching=False,
    )
    rows = watch(runners(engine)[1])
    prompt = prompts()[0]
    tokens(engine, request(prompt, max_tokens=20, ignore_eos=True))
    blocks = [n for step in recorder.steps for n in step.drafted_per_block]
    plain = sum(1 for step in recorder.steps if not step.drafted_per_block) - 1  # without the prefill
    assert sum(rows) == len(prompt) + sum(n + 1 for n in blocks) + plain


@pytest.mark.parametrize("support", ["top_p", "expert_top_p"])
def test_conservative_variants_keep_to_a_nucleus(support, target, expert, anti, oracle):
    own = pair("p", anti, expert, alpha=1.6, support=support, support_top_p=0.6)
    engine = tiny_engine(steered_spec(target, own))
    prompt = prompts()[3]
    [[events]] = run(engine, request(prompt, logprobs=300, max_tokens=8, temperature=1.0, seed=3))
    text = list(prompt)
    for event in events:
        for entry in event.logprobs or ():
            m, e, a = (oracle.last(path, text) for path in (target, expert, anti))
            combined = m + 1.6 * (e - a)
            allowed = nucleus(combined if support == "top_p" else e, 0.6)
            got = {token for token, logprob in entry.top if logprob > -1e30}
            assert got == allowed
            text.append(entry.token_id)


def nucleus(logits: np.ndarray, top_p: float) -> set[int]:
    probs = np.exp(log_softmax(logits))
    order = np.argsort(-probs, kind="stable")
    count = int((probs[order].cumsum() < top_p).sum()) + 1
    return {int(token) for token in order[:count]}


def test_a_prompt_of_its_own_steers_the_target_by_itself(target, oracle):
    """Mode cfg with the target as its own anti-expert: one set of weights, one forward, two prompts."""
    engine = tiny_engine(steered_spec(target, pair("p", "self", mode="cfg", alpha=0.7, anti_prompt="no")))
    target_runner, own_runner = runners(engine)
    assert own_runner is target_runner
    base, own = prompts()[:2]
    asked = steered(base, {}, own_prompts=(tuple(own),), max_tokens=14)
    calls = watch(target_runner)
    got = tokens(engine, asked)[0]
    assert len(calls) == len(got)

    output: list[int] = []
    while len(output) < 14 and EOS_ID not in output:
        m, a = (oracle.last(target, [*prompt, *output]) for prompt in (base, own))
        output.append(int((m + 0.7 * (m - a)).argmax()))
    assert got == output


def test_vocabularies_of_different_widths_are_aligned(target, expert, tiny_checkpoint, oracle):
    """Rows that only the anti-expert has are cut; ids that only the target has never come out."""
    wide = tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1, vocab_size=320)
    copy_tokenizer(target, wide)
    engine = tiny_engine(steered_spec(target, pair("p", wide, expert, alpha=1.2)))
    prompt = prompts()[4]
    members = dict.fromkeys((target, expert, wide), prompt)
    wanted = oracle.greedy(lambda m, e, a: m + 1.2 * (e - a), members, 24, EOS_ID)
    assert tokens(engine, request(prompt)) == [wanted]
    engine = tiny_engine(steered_spec(wide, pair("p", target, expert, alpha=1.2)))
    [[events]] = run(engine, request(prompt, logprobs=320, max_tokens=4))
    assert all(logprob == -np.inf for token, logprob in distribution(events)[0].items() if token >= 300)


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")


def test_other_tokenizers_are_refused_with_both_hashes(target, expert, tiny_checkpoint):
    other = tiny_checkpoint("qwen3", seed=4, num_hidden_layers=1, vocab_size=290)
    with pytest.raises(
        ArtifactError, match=r"tokenizer \(SHA-256 [0-9a-f]{64}\) is not the target's \([0-9a-f]{64}\)"
    ):
        tiny_engine(steered_spec(target, pair("p", other, expert)))


def test_a_draft_named_expert_needs_one(target, anti):
    own = pair("p", target, target, alpha=1.0)  # folds into the base
    with pytest.raises(ConfigError, match="no pair has an expert beside the target"):
        tiny_engine(steered_spec(target, own, pair("q", anti, mode="cfg"), draft="expert"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strengths": {"q": 1.0}}, "no steering pair 'q'; it has: p"),
        ({"strengths": {"p": 4.5}}, "from 0 to 4, not 4.5"),
        ({"strengths": {"p": float("nan")}}, "from 0 to 4, not nan"),
        ({"own_prompts": ((1,),)}, "expected 2 member prompts, got 1"),
        ({"own_prompts": ((1,), ())}, "is empty"),
        ({"own_prompts": ((1,), (2,)), "prompt_logprobs": 1}, "reads another prompt"),
    ],
)
def test_what_can_never_run_is_refused(asked, message, target, expert, anti):
    engine = tiny_engine(steered_spec(target, pair("p", anti, expert)))
    with pytest.raises(InvalidRequestError, match=message):
        engine.check(
            steered(
                [5, 6], asked.get("strengths", {}), **{k: v for k, v in asked.items() if k != "strengths"}
            )
        )


def test_a_member_prompt_beyond_its_context_is_refused(target, expert, anti):
    engine = tiny_engine(steered_spec(target, pair("p", anti, expert)))
    with pytest.raises(ContextLengthError, match="its prompt has 500 and 24 more"):
        engine.check(steered([5, 6], {}, own_prompts=((5,) * 500, (5,))))


def test_a_hundred_requests_with_random_strengths_are_each_as_alone(target, expert, anti, tiny_checkpoint):
    """Two models, little KV memory (so that some are preempted), cancellations; no block is lost."""
    other = tiny_checkpoint("qwen3", seed=8, num_hidden_layers=1)
    models = (
        steered_spec(target, pair("p", anti, expert, alpha=1.0), draft="expert", max_draft_tokens=3),
        steered_spec(
            other, pair("p", "self", mode="cfg", anti_prompt="x"), pair("r", anti, expert), name="n"
        ),
    )
    rng, recorder = random.Random(6), Recorder()
    made = [one_of_many(rng) for _ in range(100)]
    alone = tiny_engine(*models)
    wanted = {r.id: tokens(alone, r)[0] for r in made}
    # Room for a few sequences only.
    crowd = tiny_engine(*models, observer=recorder, kv_cache_gib=0.12 / 1024, max_batch_tokens=64)
    submit(crowd, *made)
    output: dict[str, list[int]] = {r.id: [] for r in made}
    cancelled = {r.id for r in made if rng.random() < 0.2}
    for step in range(100_000):
        if not crowd.has_work:
            break
        for request_id, event in crowd.step():
            output[request_id] += event.token_ids
        if step % 3 == 0 and cancelled & set(output):
            crowd.cancel(sorted(cancelled)[step // 3 % len(cancelled)])
    assert crowd.kv_usage() == 0
    assert sum(step.preemptions for step in recorder.steps) > 0
    for request_id, got in output.items():
        full = wanted[request_id]
        assert got == full[: len(got)]
        assert request_id in cancelled or got == full


def one_of_many(rng: random.Random) -> Request:
    model = rng.choice(["m", "n"])
    strength = rng.choice([None, 0.0, round(rng.uniform(0, 3), 2)])
    base = [rng.randrange(4, 300) for _ in range(rng.randint(1, 40))]
    own: tuple[tuple[int, ...], ...] = ()
    if rng.random() < 0.5:
        count = 2 if model == "m" else 3
        own = tuple(tuple(rng.randrange(4, 300) for _ in range(rng.randint(1, 40))) for _ in range(count))
    made = request(base, model=model, max_tokens=rng.randint(1, 30))
    steering = SteeringParams({"p": strength}, own)
    return Request(made.id, model, made.prompt_ids, made.sampling, made.speculation, steering=steering)
