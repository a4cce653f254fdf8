"""The roofline, speculation and the load, each by hand-computed examples and by what must hold for any numbers."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_hf_config

from paceline.server.errors import ConfigError
from paceline.server.models.config import parse_model_config
from paceline.server.planning.footprint import Footprint
from paceline.server.planning.plan import Ask, Memory, Plan, batch_sizes, make_plan
from paceline.server.planning.roofline import (
    Machine,
    Overheads,
    Work,
    all_reduce_seconds,
    binding_batch,
    decode_seconds,
    forward_seconds,
    p_norm,
    prefill_seconds,
)
from paceline.server.planning.speculation import Draft, best_step, draft_seconds, pays_up_to, step, tau
from paceline.server.planning.traffic import Fleet, Goals, Replica, Requests, fleet

CONFIG = parse_model_config(tiny_hf_config("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8))
#: 1,000 bytes of blocks and 200 of head; 2,000 operations a row and 400 a logit; 10 bytes of KV a token.
MODEL = Footprint(CONFIG, "int8", 0.0, 1000, 200, 300, 2000, 400, 50, 10, (None, None))
#: A quarter of it.
SMALL = Footprint(CONFIG, "int8", 0.0, 250, 50, 0, 500, 100, 10, 2, (None, None))
#: 100 bytes and 1,000 operations a second, attention computed at 500 and K and V read at 50.
MACHINE = Machine(memory=1e6, bandwidth=100, kv_bandwidth=50, linear_flops=1000, attention_flops=500)
rates = st.floats(1e-3, 1e3)
batches = st.floats(1, 200)


def scaled(machine: Machine, bandwidth: float = 1.0, compute: float = 1.0) -> Machine:
    return replace(
        machine,
        bandwidth=machine.bandwidth * bandwidth,
        kv_bandwidth=machine.kv_bandwidth * bandwidth,
        linear_flops=machine.linear_flops * compute,
        attention_flops=machine.attention_flops * compute,
    )


def test_one_row_is_bound_by_reading_and_many_by_computing() -> None:
    """1,200 bytes at 100/s are 12 s; a row computes 2,400 operations at 1,000/s: 2.4 s. Ten rows: 24 s."""
    one, ten = (forward_seconds(MACHINE, MODEL, Work(n, n, n, 0)) for n in (1, 10))
    assert one.linears == pytest.approx(12.0)
    assert ten.linears == pytest.approx(24.0)
    assert binding_batch(MACHINE, MODEL) == pytest.approx(5.0)


def test_partial_overlap_is_between_the_maximum_and_the_sum() -> None:
    work = Work(5, 5, 5, 0)  # 12 s both ways
    assert forward_seconds(replace(MACHINE, overlap=1.0), MODEL, work).linears == pytest.approx(24.0)
    assert forward_seconds(replace(MACHINE, overlap=2.0), MODEL, work).linears == pytest.approx(
        12 * math.sqrt(2)
    )
    assert p_norm(0.0, 0.0, 2.0) == 0.0


def test_attention_reads_kv_once_per_sequence_and_computes_per_row() -> None:
    """Three rows of two sequences that have 100 tokens each: K and V of 2 x 101.5 tokens, 10 bytes each, at 50/s are
    40.6 s; the rows attend to 101.25 tokens on average, 50 operations each, at 500/s: 30.4 s."""
    got = forward_seconds(MACHINE, MODEL, Work(3, 3, 2, 100))
    assert got.attention == pytest.approx(40.6)
    computing = forward_seconds(replace(MACHINE, kv_bandwidth=1e9), MODEL, Work(3, 3, 2, 100))
    assert computing.attention == pytest.approx(3 * 101.25 * 50 / 500)


def test_a_forward_without_logits_leaves_the_head_out() -> None:
    assert forward_seconds(MACHINE, MODEL, Work(1, 0, 1, 0)).linears == pytest.approx(10.0)


def test_a_prompt_goes_in_chunks_and_wants_one_row_of_logits() -> None:
    """Five tokens in chunks of two: 10 s of reading twice, and 12 s with the head."""
    still = replace(MACHINE, attention_flops=1e12, kv_bandwidth=1e12, overheads=Overheads(step=1.0, row=0.5))
    assert prefill_seconds(still, MODEL, 5, 2) == pytest.approx(10 + 10 + 12 + 3 * 1.0 + 0.5)


def test_forwards_of_many_rows_compute_at_a_rate_of_their_own() -> None:
    machine = replace(MACHINE, chunk_flops=250)
    assert [machine.linear_rate(n) for n in (1, 64, 128, 256, 512)] == pytest.approx(
        [1000, 1000, 500, 250, 250]
    )
    assert MACHINE.linear_rate(512) == 1000
    many, few = (forward_seconds(machine, MODEL, Work(n, 0, 1, 0)).linears for n in (256, 64))
    assert many == pytest.approx(256 * 2000 / 250)
    assert few == pytest.approx(64 * 2000 / 1000)


def test_the_engines_own_time() -> None:
    over = Overheads(step=1.0, sequence=0.1, row=0.01, drafting=2.0, drafted=0.2)
    assert over.around(4, 12) == pytest.approx(1.52)
    machine = replace(MACHINE, overheads=over)
    for block, own in ((0, 1.44), (2, 1.52 + 2.0 + 0.8)):
        draft = Draft("ngram", None, 0.5, 4)
        extra = (
            step(machine, MODEL, 4, 0, draft, block).seconds
            - step(MACHINE, MODEL, 4, 0, draft, block).seconds
        )
        assert extra == pytest.approx(own)


def test_devices_share_bytes_operations_and_kv_and_pay_all_reduces() -> None:
    """Eight devices, but only four KV heads; an all-reduce is 7/4 of its bytes over 1,000/s and 0.1 s."""
    eight = replace(MACHINE, devices=8, link=1000, all_reduce_seconds=0.1)
    alone, together = (forward_seconds(m, MODEL, Work(1, 1, 1, 100)) for m in (MACHINE, eight))
    assert together.linears == pytest.approx(alone.linears / 8)
    assert together.attention == pytest.approx(alone.attention / 4)
    payload = CONFIG.hidden_size * 2
    assert all_reduce_seconds(eight, payload) == pytest.approx(0.1 + 1.75 * payload / 1000)
    assert together.communication == pytest.approx(2 * CONFIG.num_layers * all_reduce_seconds(eight, payload))
    assert alone.communication == 0.0


@given(rates, rates, batches, st.floats(0, 1e4), st.integers(1, 5))
def test_more_bandwidth_or_computing_is_never_slower_and_more_work_never_faster(
    bandwidth: float, compute: float, sequences: float, context: float, rows: int
) -> None:
    machine = scaled(MACHINE, bandwidth, compute)
    base = decode_seconds(machine, MODEL, sequences, context, rows)
    assert decode_seconds(scaled(machine, bandwidth=2.0), MODEL, sequences, context, rows) <= base
    assert decode_seconds(scaled(machine, compute=2.0), MODEL, sequences, context, rows) <= base
    assert decode_seconds(scaled(machine, 2.0, 2.0), MODEL, sequences, context, rows) == pytest.approx(
        base / 2
    )
    assert decode_seconds(machine, MODEL, sequences, context, rows + 1) >= base
    assert decode_seconds(machine, MODEL, sequences + 1, context, rows) >= base
    assert decode_seconds(machine, MODEL, sequences, context + 1, rows) >= base


def test_tau_by_hand() -> None:
    assert tau(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert tau(1.0, 4) == 5
    assert tau(0.0, 4) == 1
    assert tau(0.7, 0) == pytest.approx(1.0)


def test_a_drafted_step_is_tau_over_cg_plus_v() -> None:
    """Plain 12 s; three rows 12 s still (v = 1); the draft reads 300 bytes: 3 s each (c = 1/4). tau 1.75 of g = 2."""
    free = replace(MACHINE, attention_flops=1e12, kv_bandwidth=1e12)
    got = step(free, MODEL, 1, 0, Draft("d", SMALL, 0.5, 4), 2)
    assert (got.c, got.v, got.tau) == pytest.approx((0.25, 1.0, 1.75))
    plain = step(free, MODEL, 1, 0)
    assert got.tokens_per_second / plain.tokens_per_second == pytest.approx(1.75 / (0.25 * 2 + 1.0))


def test_a_draft_computes_first_what_the_step_before_committed() -> None:
    """Bound by computing: 600 operations a row. Of g = 2 at alpha = 1/2: 1.25 rows with a logit, then one."""
    bound = replace(MACHINE, bandwidth=1e12, kv_bandwidth=1e12, attention_flops=1e12)
    draft = Draft("d", SMALL, 0.5, 4)
    assert draft_seconds(bound, draft, 1, 0, 2) == pytest.approx((1.25 * 500 + 100 + 600) / 1000)
    reading = replace(SMALL, config=replace(CONFIG, reads_state=True))
    assert draft_seconds(bound, replace(draft, model=reading), 1, 0, 2) == pytest.approx(
        (1.75 * 500 + 700) / 1000
    )
    assert draft_seconds(bound, replace(draft, model=None), 1, 0, 2) == 0.0


def test_on_several_devices_a_draft_takes_the_faster_of_sharing_and_not_sharing() -> None:
    draft = Draft("d", SMALL, 0.5, 4)
    slow_link = replace(MACHINE, devices=4, link=1.0, all_reduce_seconds=100.0)
    assert draft_seconds(slow_link, draft, 1, 0, 2) == draft_seconds(MACHINE, draft, 1, 0, 2)
    fast_link = replace(MACHINE, devices=4, link=1e12)
    assert draft_seconds(fast_link, draft, 1, 0, 2) < 0.3 * draft_seconds(MACHINE, draft, 1, 0, 2)


@given(rates, rates, batches, st.floats(0, 1e3), st.integers(1, 8))
def test_a_draft_that_is_never_right_never_pays(
    bandwidth: float, compute: float, sequences: float, context: float, longest: int
) -> None:
    machine = scaled(MACHINE, bandwidth, compute)
    for model in (SMALL, None):
        best = best_step(machine, MODEL, sequences, context, Draft("d", model, 0.0, longest))
        assert best.draft_tokens == 0
    assert pays_up_to(machine, MODEL, context, Draft("d", SMALL, 0.0, longest), 64) is None


@given(rates, batches, st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_better_draft_is_never_slower_and_what_pays_wins_enough(
    compute: float, sequences: float, one: float, other: float
) -> None:
    machine = replace(scaled(MACHINE, 1.0, compute), kv_bandwidth=1e9, attention_flops=1e9)
    worse, better = sorted((one, other))
    speeds = [
        best_step(machine, MODEL, sequences, 10, Draft("d", None, alpha, 4)) for alpha in (worse, better)
    ]
    assert speeds[1].tokens_per_second >= speeds[0].tokens_per_second * (1 - 1e-12)
    plain = step(machine, MODEL, sequences, 10)
    for best in speeds:
        assert best.tokens_per_second >= plain.tokens_per_second
        assert best.draft_tokens == 0 or best.tokens_per_second > 1.05 * plain.tokens_per_second


def test_drafting_pays_until_verification_computes() -> None:
    """Perfect n-grams of one token: two rows a sequence are free up to 2.5 sequences (5 rows bind), and cost nothing
    but the head start up to 5; beyond both are bound by computing, and two tokens cost twice one."""
    free = replace(MACHINE, attention_flops=1e12, kv_bandwidth=1e12)
    draft = Draft("ngram", None, 1.0, 1)
    assert step(free, MODEL, 2, 0, draft, 1).v == pytest.approx(1.0)
    assert pays_up_to(free, MODEL, 0, draft, 100) == 4
    assert pays_up_to(free, MODEL, 0, draft, 3) == 3
    assert best_step(free, MODEL, 5, 0, draft).draft_tokens == 0


def plain_replica(machine: Machine = MACHINE, limit: int = 8, prefill: float = 2.0) -> Replica:
    free = replace(machine, attention_flops=1e12, kv_bandwidth=1e12)
    return Replica(lambda n: step(free, MODEL, n, 0), limit, prefill)


def test_littles_law_by_hand() -> None:
    """A step takes 12 s for up to 5 sequences. 0.05 requests/s of 4 tokens, prompts of 2 s: a tenth of the time is
    prompts', so that 0.05 x 4 x 12 / 0.9 = 2.67 sequences decode at once and a gap is 12 / 0.9 s."""
    load = plain_replica().load(Requests(0.05, 1, 4), 0.05)
    assert load is not None
    assert load.prefill_share == pytest.approx(0.1)
    assert load.batch == pytest.approx(0.05 * 4 * 12 / 0.9)
    assert load.itl == pytest.approx(12 / 0.9)
    assert load.ttft == pytest.approx(6 + 2 * (1 + 0.1 / 1.8))
    assert load.latency == pytest.approx(load.ttft + 3 * load.itl)
    assert load.batch == pytest.approx(load.qps * 4 * load.itl)  # Little


def test_an_idle_replica_decodes_alone() -> None:
    load = plain_replica().load(Requests(0.001, 1, 4), 0.001)
    assert load is not None
    assert load.batch == pytest.approx(0.001 * 4 * 12 / 0.998)
    assert load.step.sequences == 1.0


def test_the_most_that_a_replica_bears() -> None:
    """Eight sequences compute 19.2 s a step: 5/12 tokens a second; four of them and a prompt: 9.6 + 2 s."""
    replica, requests = plain_replica(), Requests(1.0, 1, 4)
    assert replica.most_qps(requests) == pytest.approx(1 / (4 * 19.2 / 8 + 2))
    assert replica.load(requests, replica.most_qps(requests) * 1.001) is None
    full = replica.load(requests, replica.most_qps(requests) * 0.9999)
    assert full is not None
    assert full.utilization == pytest.approx(0.9999)


@given(st.floats(1e-4, 0.085), st.floats(1.01, 3))
def test_more_requests_never_make_a_replica_faster(qps: float, times: float) -> None:
    replica, requests = plain_replica(), Requests(1.0, 1, 4)
    less, more = (replica.load(requests, rate) for rate in (qps / times, qps))
    assert less is not None
    if more is not None:
        assert more.batch >= less.batch
        assert more.itl >= less.itl * (1 - 1e-9)
        assert more.ttft >= less.ttft * (1 - 1e-9)


def test_replicas_by_utilization_and_by_goals() -> None:
    replica, requests = plain_replica(), Requests(1.0, 1, 4)
    most = replica.most_qps(requests)
    by_use = fleet(replica, requests, Goals(), 0.8)
    assert isinstance(by_use, Fleet)
    assert (by_use.replicas, by_use.reason) == (math.ceil(1.0 / (0.8 * most)), "utilization")
    assert by_use.load.utilization <= 0.8
    by_goal = fleet(replica, requests, Goals(itl=12.5), 0.8)
    assert isinstance(by_goal, Fleet)
    assert by_goal.reason == "latency goals"
    assert by_goal.replicas > by_use.replicas
    assert by_goal.load.itl <= 12.5
    fewer = replica.load(requests, 1.0 / (by_goal.replicas - 1))
    assert fewer is None or fewer.itl > 12.5


@pytest.mark.parametrize(
    ("goals", "said"),
    [
        (Goals(itl=11.0), "gap between tokens takes 12000.0 ms"),
        (Goals(ttft=1.0), "first token takes 2000.0 ms"),
    ],
)
def test_a_goal_that_an_idle_replica_misses(goals: Goals, said: str) -> None:
    why = fleet(plain_replica(), Requests(1.0, 1, 4), goals, 0.8)
    assert isinstance(why, str)
    assert why.startswith(said)
    assert why.endswith("on an idle replica already")


def ask(**changes: Any) -> Ask:
    return replace(Ask(Requests(0.0, 40, 20), 100, Goals(), None, 16, 0.8), **changes)


def plan(machine: Machine = MACHINE, draft: Draft | None = None, **changes: Any) -> Plan:
    return make_plan(machine, MODEL, draft, ask(**changes))


def test_what_fits_by_hand() -> None:
    """1,500 of 11,500 bytes are weights; a sequence has 50 tokens on average, 10 bytes each, and 100 at the longest."""
    machine = replace(MACHINE, memory=11_500)
    found = plan(machine)
    assert found.memory == Memory(11_500, 1500, 0, 10, 10_000, 20, 10)
    assert found.limit == 20
    assert [row.sequences for row in found.rows] == [1, 2, 4, 8, 16, 20]
    assert plan(machine, max_running=3).limit == 3
    drafting = plan(machine, Draft("d", SMALL, 0.5, 4)).memory
    assert (drafting.draft, drafting.kv_per_token, drafting.kv_total) == (300, 12, 9700)


def test_copies_of_kv_heads_and_of_the_draft_take_memory_on_every_device() -> None:
    eight = replace(MACHINE, memory=11_500, devices=8, link=1e9)
    memory = plan(eight, Draft("d", SMALL, 0.5, 4)).memory
    assert memory.total == 8 * 11_500
    assert memory.draft == 8 * 300
    assert memory.kv_per_token == 2 * 10 + 8 * 2


@given(st.floats(3000, 1e6), st.floats(1, 10))
def test_more_memory_never_fits_fewer(memory: float, times: float) -> None:
    small, large = (plan(replace(MACHINE, memory=m), max_running=1).memory for m in (memory, memory * times))
    assert large.sequences >= small.sequences
    assert large.full_contexts >= small.full_contexts
    assert small.sequences * 50 * 10 <= memory - 1500


@pytest.mark.parametrize(
    ("machine", "changes", "said"),
    [
        (replace(MACHINE, memory=2000), {}, "the model does not fit: weights take 0.0 GiB"),
        (MACHINE, {"context_tokens": 513}, "--context-tokens: 513 is over the model's 512 tokens"),
        (MACHINE, {"context_tokens": 59}, "--prompt-tokens and --output-tokens are 60 together"),
        (
            replace(MACHINE, devices=3, link=1.0),
            {},
            "--tensor-parallel: 3 devices do not divide the model's 8",
        ),
    ],
)
def test_what_cannot_be_planned(machine: Machine, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(machine, **changes)


def test_the_drafts_part_of_a_prompt_counts_where_it_drafts() -> None:
    alone, ignored, used = (
        plan(draft=d) for d in (None, Draft("d", SMALL, 0.0, 4), Draft("d", SMALL, 0.99, 4))
    )
    assert ignored.pays_up_to is None
    assert ignored.prefill == alone.prefill
    assert used.pays_up_to is not None
    assert used.prefill == pytest.approx(alone.prefill + prefill_seconds(MACHINE, SMALL, 40, 16))


def test_batch_sizes() -> None:
    assert [batch_sizes(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
