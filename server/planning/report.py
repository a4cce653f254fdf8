"""A plan as tables and as JSON: the same figures. Knows no formulas but units."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.server.planning.plan import Plan, Row
from paceline.server.planning.request import Prepared
from paceline.server.planning.speculation import Step
from paceline.server.planning.traffic import Fleet

_GIB, _MB = 2**30, 1e6
#: What the table needs; narrower terminals wrap its lines.
_WIDTH = 100


def as_dict(prepared: Prepared) -> dict[str, Any]:
    """Ready for JSON; keys carry their units."""
    plan, memory, target = prepared.plan, prepared.plan.memory, prepared.plan.target
    requests, load = plan.ask.requests, plan.fleet
    return {
        "model": prepared.model,
        "device": prepared.device,
        "devices_per_replica": plan.machine.devices,
        "weights": {
            "format": target.weights,
            "sparsity": target.sparsity,
            "bytes": memory.weights,
            "bytes_per_forward": target.bytes_per_forward,
        },
        "memory": {
            "usable_bytes": round(memory.total),
            "draft_bytes": memory.draft,
            "kv_bytes_per_token": round(memory.kv_per_token),
            "kv_cache_bytes": round(memory.kv_total),
            "max_sequences": memory.sequences,
            "max_full_contexts": memory.full_contexts,
        },
        "request": {
            "prompt_tokens": requests.prompt_tokens,
            "output_tokens": requests.output_tokens,
            "context_tokens": plan.ask.context_tokens,
            "prefill_ms": plan.prefill * 1e3,
        },
        "draft": None
        if plan.draft is None
        else {
            "name": plan.draft.name,
            "alpha": plan.draft.alpha,
            "max_draft_tokens": plan.draft.max_tokens,
            "bytes_per_forward": 0 if plan.draft.model is None else plan.draft.model.bytes_per_forward,
            "pays_up_to_sequences": plan.pays_up_to,
        },
        "max_batch": plan.limit,
        "compute_binds_at_sequences": plan.binding,
        "batches": [_row_dict(row) for row in plan.rows],
        "max_qps_per_replica": plan.most_qps,
        "load": None if load is None else _load_dict(load, prepared),
        "assumptions": [asdict(one) for one in prepared.assumptions],
    }


def _row_dict(row: Row) -> dict[str, Any]:
    plain = {"step_ms": row.plain.seconds * 1e3, "tokens_per_s": row.plain.tokens_per_second}
    best = row.best
    return {
        "sequences": row.sequences,
        "plain": plain,
        "best": {
            "draft_tokens": best.draft_tokens,
            "step_ms": best.seconds * 1e3,
            "tokens_per_step": best.tau,
            "tokens_per_s": best.tokens_per_second,
            "c": best.c,
            "v": best.v,
            "speedup": row.speedup,
        },
    }


def _load_dict(found: Fleet | str, prepared: Prepared) -> dict[str, Any]:
    qps = prepared.plan.ask.requests.qps
    if isinstance(found, str):
        return {"qps": qps, "replicas": None, "reason": found}
    load = found.load
    return {
        "qps": qps,
        "replicas": found.replicas,
        "replicas_given": prepared.replicas_given,
        "devices": found.replicas * prepared.plan.machine.devices,
        "reason": found.reason,
        "per_replica": {
            "qps": load.qps,
            "batch": load.batch,
            "draft_tokens": load.step.draft_tokens,
            "prefill_share": load.prefill_share,
            "utilization": load.utilization,
        },
        "ttft_ms": load.ttft * 1e3,
        "itl_ms": load.itl * 1e3,
        "latency_ms": load.latency * 1e3,
    }


def show(prepared: Prepared) -> None:
    """Print tables."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _WIDTH)
    for line in _heading(prepared):
        console.print(line, markup=False)
    console.print(_batches(prepared.plan))
    if prepared.plan.draft is not None:
        console.print(_pays(prepared.plan), markup=False)
    if prepared.plan.fleet is not None:
        console.print()
        for line in _load_lines(prepared, prepared.plan.fleet):
            console.print(line, markup=False)
    console.print("\nAssumptions")
    for one in prepared.assumptions:
        console.print(f"  {one.name}: {one.value} ({one.source})", markup=False)


def _heading(prepared: Prepared) -> list[str]:
    plan, memory, target = prepared.plan, prepared.plan.memory, prepared.plan.target
    requests = plan.ask.requests
    sparse = f", {target.sparsity:.0%} of the blocks' weights left out" if target.sparsity else ""
    drafting = f" + {_size(memory.draft)} of the draft" if memory.draft else ""
    return [
        f"{prepared.model} in {target.weights}{sparse}, on {prepared.device}",
        f"  weights          {_size(memory.weights)}{drafting}; a forward reads {_size(target.bytes_per_forward)}",
        f"  KV cache         {memory.kv_per_token / 1024:.1f} KiB per token; {_size(memory.kv_total)} are left for it",
        f"  sequences        {memory.sequences} of {requests.prompt_tokens} + {requests.output_tokens} tokens fit, "
        f"{memory.full_contexts} of {plan.ask.context_tokens}; at most {plan.limit} run at once",
        f"  computing binds  from {plan.binding:.0f} sequences on",
        f"  a prompt         {plan.prefill * 1e3:.1f} ms ({requests.prompt_tokens / plan.prefill:,.0f} tokens/s)",
        f"  a replica        {plan.most_qps:.3g} requests/s at the most",
        "",
    ]


def _batches(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("sequences", "step ms", "tokens/s", "each"):
        table.add_column(name, justify="right")
    if plan.draft is not None:
        for name in ("draft", "step ms", "tau", "tokens/s", "each", "c", "v", "speed-up"):
            table.add_column(name, justify="right")
    for row in plan.rows:
        cells = [str(row.sequences), *_step_cells(row.plain)]
        if plan.draft is not None:
            cells += _drafted_cells(row)
        table.add_row(*cells)
    return table


def _step_cells(step: Step) -> list[str]:
    rate = step.tokens_per_second
    return [f"{step.seconds * 1e3:.2f}", f"{rate:,.0f}", f"{rate / step.sequences:,.1f}"]


def _drafted_cells(row: Row) -> list[str]:
    best = row.best
    if not best.draft_tokens:
        return ["none", *["-"] * 7]
    seconds, rate, each = _step_cells(best)
    return [
        str(best.draft_tokens),
        seconds,
        f"{best.tau:.2f}",
        rate,
        each,
        f"{best.c:.2f}",
        f"{best.v:.2f}",
        f"{row.speedup:.2f}x",
    ]


def _pays(plan: Plan) -> str:
    assert plan.draft is not None
    if plan.pays_up_to is None:
        return f"Drafting with {plan.draft.name} pays at no batch size (alpha {plan.draft.alpha:.2f})."
    more = "at every batch size" if plan.pays_up_to == plan.limit else f"up to a batch of {plan.pays_up_to}"
    return f"Drafting with {plan.draft.name} pays {more} (alpha {plan.draft.alpha:.2f})."


def _load_lines(prepared: Prepared, found: Fleet | str) -> list[str]:
    requests = prepared.plan.ask.requests
    if isinstance(found, str):
        return [f"{requests.qps:g} requests/s: no number of replicas will do: {found}"]
    load, devices = found.load, prepared.plan.machine.devices
    given = (
        ""
        if found.replicas <= prepared.replicas_given
        else f"; what was named makes {prepared.replicas_given}"
    )
    each = f" of {devices} devices" if devices > 1 else ""
    drafting = f", drafting {load.step.draft_tokens}" if load.step.draft_tokens else ""
    return [
        f"{requests.qps:g} requests/s: {found.replicas} replica{'s' * (found.replicas > 1)}{each} "
        f"(by {found.reason}){given}",
        f"  each             {load.qps:.3g} requests/s, {load.utilization:.0%} of its most; "
        f"batch {load.batch:.1f}{drafting}; prompts take {load.prefill_share:.0%} of the time",
        f"  mean latency     first token {load.ttft * 1e3:.0f} ms, between tokens {load.itl * 1e3:.1f} ms, "
        f"whole answer {load.latency:.2f} s",
    ]


def _size(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MB:.0f} MB"
