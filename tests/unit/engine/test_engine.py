"""The engine over tiny models: same tokens as transformers, whatever shares the batch; nothing leaks."""

import random
from typing import Any

import pytest
import torch
from engines import NO_DRAFT, Recorder, ids, request, run, spec, submit, text, tiny_engine, tokens
from tiny import ARCHS, EOS_ID
from transformers import AutoModelForCausalLM

from paceline.server.engine.engine import Engine
from paceline.server.engine.request import SpeculationParams
from paceline.server.errors import ContextLengthError, InvalidRequestError, UnknownModelError

pytestmark = pytest.mark.usefixtures("kernels")


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 300) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy_oracle(folder: Any, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    out = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
            if out[-1] == EOS_ID:
                break
    return out[len(prompt) :]


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equals_transformers_in_a_batch_of_uneven_prompts(arch, tiny_checkpoint):
    folder = tiny_checkpoint(arch)
    engine = tiny_engine(spec(folder), max_batch_tokens=23)
    asked = [request(p) for p in prompts(6)]
    for r, got in zip(asked, tokens(engine, *asked), strict=True):
        assert got == greedy_oracle(folder, list(r.prompt_ids), 24)


@pytest.fixture(scope="session")
def drafts(tiny_checkpoint):
    """Draft folders by how well they agree with the seed-0 llama target."""
    return {
        "near": tiny_checkpoint("llama", perturb=0.02),
        "far": tiny_checkpoint("llama", seed=5),
        "small": tiny_checkpoint("qwen3", seed=6, num_hidden_layers=1),
    }


@pytest.mark.parametrize("draft", ["near", "far", "small", "ngram"])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_greedy_with_speculation_equals_without(draft, length, tiny_checkpoint, drafts):
    target = tiny_checkpoint("llama")
    plain = tiny_engine(spec(target))
    recorder = Recorder()
    fast = tiny_engine(
        spec(target, draft=drafts.get(draft, draft), max_draft_tokens=length),
        observer=recorder,
        max_batch_tokens=32,
    )
    asked: list[dict[str, Any]] = [
        {"prompt": p, "max_tokens": 40, "repetition_penalty": 1.0 + 0.3 * (i % 2)}
        for i, p in enumerate(prompts(8))
    ]
    expected = tokens(plain, *(request(**a) for a in asked))
    assert tokens(fast, *(request(**a) for a in asked)) == expected
    blocks = [n for s in recorder.steps for n in s.drafted_per_block]
    assert max(blocks) == length
    if draft == "near":
        assert sum(a for s in recorder.steps for a in s.accepted_per_block) > 0.2 * sum(blocks)


@pytest.mark.parametrize(
    "warping", [{}, {"top_k": 20, "top_p": 0.9}, {"presence_penalty": 1.0, "min_p": 0.05}]
)
def test_seeded_text_is_the_same_alone_in_a_crowd_and_under_any_draft(warping, tiny_checkpoint, drafts):
    target = tiny_checkpoint("llama")
    crowd = prompts(8, seed=3)
    sampling: dict[str, Any] = {"temperature": 0.9, "seed": 1234, "max_tokens": 30, **warping}
    expected = tokens(tiny_engine(spec(target)), request(crowd[0], **sampling))[0]
    assert len(set(expected)) > 5
    for draft in (None, "near", "far", "ngram"):
        engine = tiny_engine(
            spec(target, draft=drafts.get(draft, draft), max_draft_tokens=4), max_batch_tokens=40
        )
        for _ in ("cold", "warm"):
            asked = [request(crowd[0], **sampling)] + [request(p, temperature=1.0) for p in crowd[1:]]
            random.Random(7).shuffle(asked)
            results = tokens(engine, *asked)
            mine = next(i for i, r in enumerate(asked) if r.sampling.seed is not None)
            assert results[mine] == expected, draft


def test_seeds_and_choices_differ(tiny_checkpoint):
    engine = tiny_engine(spec(tiny_checkpoint("llama")))
    sampling: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
    [three] = run(engine, request([5, 6, 7], n=3, seed=1, **sampling))
    [other] = run(engine, request([5, 6, 7], n=1, seed=2, **sampling))
    assert len({tuple(ids(c)) for c in [*three, *other]}) == 4


def test_prefix_cache_shares_blocks_between_choices_and_requests(tiny_checkpoint):
    recorder = Recorder()
    engine = tiny_engine(spec(tiny_checkpoint("llama")), observer=recorder)
    prompt = prompts(1, seed=9, longest=60)[0] * 3
    [first] = run(engine, request(prompt, n=3, temperature=1.0))
    whole_blocks = (len(prompt) - 1) // 16 * 16
    assert [c[-1].cached_tokens for c in first] == [0, whole_blocks, whole_blocks]
    [[second]] = run(engine, request(prompt))
    assert second[-1].cached_tokens == whole_blocks
    fresh = tiny_engine(spec(tiny_checkpoint("llama")))
    assert ids(second) == tokens(fresh, request(prompt))[0]
    assert sum(s.prefix_hits for s in recorder.steps) == 3 * whole_blocks


@pytest.mark.parametrize("draft", [None, "near"])
def test_preemption_recomputes_and_changes_nothing(draft, tiny_checkpoint, drafts):
    target = tiny_checkpoint("llama")
    asked: list[dict[str, Any]] = [{"prompt": p, "max_tokens": 60} for p in prompts(6, seed=4, longest=30)]
    expected = tokens(tiny_engine(spec(target)), *(request(**a) for a in asked))
    recorder = Recorder()
    tight = tiny_engine(
        spec(target, draft=drafts.get(draft)), observer=recorder, kv_cache_gib=(14 * 16 * 512) / 2**30
    )
    assert tokens(tight, *(request(**a) for a in asked)) == expected
    assert sum(s.preemptions for s in recorder.steps) > 0
    assert tight.kv_usage() == 0


def test_cancelling_frees_blocks_at_once_wherever_the_request_is(tiny_checkpoint, drafts):
    engine = tiny_engine(
        spec(tiny_checkpoint("llama"), draft=drafts["near"]), max_batch_tokens=16, max_running=2
    )
    asked = [request(p + p, n=2, max_tokens=400, ignore_eos=True) for p in prompts(4, seed=5)]
    submit(engine, *asked)
    for _ in range(6):
        engine.step()
    assert engine.kv_usage() > 0
    assert engine.loads()["m"].waiting > 0
    for r in asked:
        engine.cancel(r.id)
    assert engine.kv_usage() == 0
    assert (engine.loads()["m"].running, engine.loads()["m"].waiting) == (0, 0)
    assert not engine.has_work
    engine.cancel("never heard of")


def test_logprobs_are_of_the_raw_distribution_with_and_without_drafts(tiny_checkpoint, drafts):
    target = tiny_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    prompt = prompts(1, seed=8)[0]
    for draft in (None, drafts["near"], "ngram"):
        engine = tiny_engine(spec(target, draft=draft), max_batch_tokens=7)
        [[events]] = run(
            engine,
            request(prompt, temperature=0.7, seed=3, logprobs=3, prompt_logprobs=2, logit_bias={9: 5.0}),
        )
        got = [entry for event in events for entry in event.logprobs or ()]
        sequence = prompt + ids(events)
        with torch.inference_mode():
            reference = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        prompt_entries = events[0].prompt_logprobs
        assert prompt_entries is not None
        assert prompt_entries[0].logprob is None
        assert [e.token_id for e in prompt_entries] == prompt
        for i, entry in enumerate([*prompt_entries, *got]):
            if i == 0:
                continue
            assert entry.token_id == sequence[i]
            assert entry.logprob == pytest.approx(float(reference[i - 1, sequence[i]]), abs=1e-3)
            best = reference[i - 1].topk(len(entry.top))
            assert [t for t, _ in entry.top] == best.indices.tolist()
            assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert len(got[0].top) == 3
        assert len(prompt_entries[1].top) == 2


def test_scoring_only_returns_no_tokens(tiny_checkpoint):
    engine = tiny_engine(spec(tiny_checkpoint("llama")))
    [[events]] = run(engine, request([5, 6, 7, 8], max_tokens=0, prompt_logprobs=1))
    assert ids(events) == []
    assert events[-1].finish_reason == "length"
    assert len(events[-1].prompt_logprobs or ()) == 4


@pytest.mark.parametrize("draft", [None, "near"])
def test_stop_conditions(draft, tiny_checkpoint, drafts):
    target = tiny_checkpoint("llama")

    def one(**sampling: Any) -> tuple[list[int], str, str | None]:
        engine = tiny_engine(spec(target, draft=drafts.get(draft)))
        [[events]] = run(engine, request([40, 41, 42], seed=5, temperature=1.2, ignore_eos=True, **sampling))
        return ids(events), text(events), events[-1].finish_reason

    whole_ids, whole, reason = one(max_tokens=40)
    assert (len(whole_ids), reason) == (40, "length")
    stop = whole[11:14]
    cut_ids, cut, reason = one(max_tokens=40, stop=(stop,))
    assert (cut, reason) == (whole[: whole.index(stop)], "stop")
    assert cut_ids == whole_ids[: len(cut_ids)]
    stop_id = whole_ids[9]
    stopped, _, reason = one(max_tokens=40, stop_token_ids=(stop_id,))
    assert stopped == whole_ids[: whole_ids.index(stop_id) + 1]
    assert reason == "stop"
    masked, _, _ = one(max_tokens=40, stop_token_ids=(whole_ids[0],), min_tokens=5)
    assert len(masked) >= 6 or whole_ids[0] not in masked[:5]
    assert whole_ids[0] not in masked[:5]


def test_eos_ends_a_choice_and_its_text_is_not_returned(tiny_checkpoint):
    engine = tiny_engine(spec(tiny_checkpoint("llama"), draft="ngram"))
    [[events]] = run(engine, request([5, 6], max_tokens=50, logit_bias={EOS_ID: 100.0}))
    assert (ids(events), text(events), events[-1].finish_reason) == ([EOS_ID], "", "stop")
    [[events]] = run(engine, request([5, 6], max_tokens=9, logit_bias={EOS_ID: 100.0}, ignore_eos=True))
    assert ids(events) == [EOS_ID] * 9


def test_speculation_statistics_add_up(tiny_checkpoint, drafts):
    engine = tiny_engine(spec(tiny_checkpoint("llama"), draft=drafts["near"], max_draft_tokens=3))
    [[events]] = run(engine, request([5, 6, 7], max_tokens=60, ignore_eos=True))
    stats = events[-1].speculation
    assert stats is not None
    assert sum(stats.acceptance_histogram) == stats.num_spec_steps
    assert sum(i * c for i, c in enumerate(stats.acceptance_histogram)) == stats.num_accepted_draft_tokens
    assert len(stats.acceptance_histogram) == 4
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens
    assert len(events) < 40  # several tokens a step
    [[plain]] = run(engine, request([5, 6, 7], max_tokens=60, ignore_eos=True, speculation=NO_DRAFT))
    assert plain[-1].speculation is not None
    assert plain[-1].speculation.num_spec_steps == 0
    assert ids(plain) == ids(events)
    short = SpeculationParams(max_draft_tokens=1, draft="ngram")
    [[ngram]] = run(engine, request([5, 6, 7], max_tokens=60, ignore_eos=True, speculation=short))
    assert ids(ngram) == ids(events)
    assert ngram[-1].speculation is not None
    assert len(ngram[-1].speculation.acceptance_histogram) <= 2


def test_several_models_share_weights_blocks_and_steps(tiny_checkpoint):
    same, other = tiny_checkpoint("llama"), tiny_checkpoint("qwen2")
    recorder = Recorder()
    engine = tiny_engine(spec(same, "a"), spec(same, "b"), spec(other, "c"), observer=recorder)
    assert engine._models["a"].runner is engine._models["b"].runner
    prompt = prompts(1, seed=11)[0] * 2
    alone = tokens(engine, request(prompt, model="a", max_tokens=30, ignore_eos=True))[0]
    [[on_b], [on_c]] = run(
        engine,
        request(prompt, model="b", max_tokens=30, ignore_eos=True),
        request(prompt, model="c", max_tokens=30, ignore_eos=True),
    )
    assert ids(on_b) == alone
    assert on_b[-1].cached_tokens > 0  # computed for "a", same weights
    assert on_c[-1].cached_tokens == 0
    order = [s.model for s in recorder.steps if s.model != "a"]
    # Shares are of time, so the counts follow how long each step took; one after the other would be 20 to 0.
    assert min(order[:20].count("b"), order[:20].count("c")) >= 2
    assert engine.kv_usage() == 0


def test_fair_stepping_does_not_let_a_busy_model_starve_another(tiny_checkpoint):
    recorder = Recorder()
    engine = tiny_engine(
        spec(tiny_checkpoint("llama"), "busy"), spec(tiny_checkpoint("qwen2"), "quiet"), observer=recorder
    )
    submit(engine, *(request(p, model="busy", max_tokens=200, ignore_eos=True) for p in prompts(8)))
    for _ in range(30):
        engine.step()
    quiet = request([5, 6, 7], model="quiet", max_tokens=10, ignore_eos=True)
    submit(engine, quiet)
    before = len(recorder.steps)
    finished = False
    while not finished:
        finished = any(rid == quiet.id and e.finish_reason for rid, e in engine.step())
    mine = [s.model for s in recorder.steps[before:]]
    assert mine.count("quiet") == 10
    assert mine.count("busy") < 60  # it has had 30 steps of credit; the newcomer starts level, not behind


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"prompt": []}, InvalidRequestError),
        ({"prompt": [5] * 600}, ContextLengthError),
        ({"prompt": [5], "max_tokens": 512}, ContextLengthError),
        ({"prompt": [5], "model": "nope"}, UnknownModelError),
        ({"prompt": [5], "speculation": SpeculationParams(draft="nope")}, InvalidRequestError),
        ({"prompt": [5], "speculation": SpeculationParams(max_draft_tokens=99)}, InvalidRequestError),
    ],
)
def test_what_can_never_run_is_refused_at_the_door(bad, error, tiny_checkpoint):
    engine: Engine = tiny_engine(spec(tiny_checkpoint("llama")))
    with pytest.raises(error):
        engine.check(request(**bad))


def test_a_request_larger_than_the_kv_pool_is_refused(tiny_checkpoint):
    engine = tiny_engine(spec(tiny_checkpoint("llama")), kv_cache_gib=(2 * 16 * 512) / 2**30)
    with pytest.raises(InvalidRequestError, match="kv_cache_gib"):
        engine.check(request([5] * 10, max_tokens=40))


def test_prefill_goes_on_beside_many_decodes_with_long_drafts(tiny_checkpoint):
    """64 drafting sequences use up the token budget of every step; a newcomer's prompt must still be computed."""
    engine = tiny_engine(
        spec(tiny_checkpoint("llama"), draft="ngram", max_draft_tokens=8),
        max_batch_tokens=64,
        kv_cache_gib=0.05,
    )
    crowd = [request([7, 8] * 10, max_tokens=400, ignore_eos=True) for _ in range(32)]
    submit(engine, *crowd)
    for _ in range(15):
        engine.step()
    newcomer = request(prompts(1, seed=2, longest=60)[0] * 2, max_tokens=2)
    submit(engine, newcomer)
    steps = 0
    while not any(rid == newcomer.id for rid, _ in engine.step()):
        steps += 1
    assert steps <= 120 // (64 // 8) + 1
