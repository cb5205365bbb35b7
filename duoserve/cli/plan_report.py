"""Plans as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from duoserve.byte_sizes import format_bytes
from duoserve.errors import MemoryBudgetError
from duoserve.planning.planner import Plan, Planner
from duoserve.planning.policy_speed import Speed
from duoserve.replaying.hardware import Hardware


def figures(planner: Planner, answer: Plan | MemoryBudgetError) -> dict[str, Any]:
    """An answer as an object for JSON; sizes are bytes, times are seconds."""
    if isinstance(answer, MemoryBudgetError):
        return {"refusal": str(answer)}
    memory = answer.memory
    return {
        "hardware": answer.hardware.name,
        "experts": answer.layout.name,
        "slot_bytes": memory.slot_bytes,
        "slots": memory.num_slots,
        "total_experts": memory.total_experts,
        "dense_bytes": memory.dense_bytes,
        "kv_bytes": memory.kv_bytes,
        "workspace_bytes": memory.workspace_bytes,
        "total_bytes": memory.total_bytes,
        "host_bytes": memory.host_bytes,
        "best": answer.best.policy,
        "policies": [_speed(speed) for speed in answer.speeds.values()],
        "routing": answer.routing,
        "notes": list(answer.notes),
        "would_buy": {
            name: {"slots": other.memory.num_slots, "tpot_s": other.best.tpot.total, "ttft_s": other.best.ttft.total}
            for name, other in _others(planner, answer)
        },
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "policy": speed.policy,
        "ttft_s": speed.ttft.total,
        "first_ttft_s": speed.first_ttft_s,
        "ttft_bound": speed.ttft.bound,
        "tpot_s": speed.tpot.total,
        "tpot_bound": speed.tpot.bound,
        "tpot_busy_s": dict(speed.tpot.busy),
        "hit_rate": speed.hit_rate,
    }


def _others(planner: Planner, plan: Plan) -> Iterator[tuple[str, Plan]]:
    for name, other in (("1 GiB more", planner.one_gib_more(plan)), ("int4", planner.in_int4(plan))):
        if other is not None:
            yield name, other


def lines(planner: Planner, machine: Hardware, answer: Plan | MemoryBudgetError) -> Iterator[str]:
    """An answer as lines of text."""
    if isinstance(answer, MemoryBudgetError):
        yield from (f"{machine.name}: cannot run it", f"  {answer}", "")
        return
    question, batch = answer.question, answer.question.batch
    yield (
        f"{machine.name}: experts in {answer.layout.name}, {format_bytes(answer.memory.slot_bytes)} each; "
        f"{batch} x {question.prompt} tokens and {question.new_tokens} new ones"
    )
    yield from (f"  {line}" for line in str(answer.memory).splitlines())
    yield f"  {'policy':<16}{'TTFT':>10}{'bound':>10}{'TPOT':>12}{'bound':>10}{'tok/s':>9}{'hits':>8}"
    yield from (_row(speed, batch) for speed in answer.speeds.values())
    yield f"  best: {answer.best.policy}; the first prompt, with empty slots, takes {answer.best.first_ttft_s:.2f} s"
    for name, other in _others(planner, answer):
        faster = answer.best.tpot.total / other.best.tpot.total
        yield f"  {name}: {other.memory.num_slots} slots, TPOT {_milliseconds(other.best)}, {faster:.2f}x as fast"
    yield from (f"  note: {note}" for note in answer.notes)
    yield ""


def _row(speed: Speed, batch: int) -> str:
    hits = f"{speed.hit_rate:.1%}" if speed.hit_rate else "-"
    rate = batch / speed.tpot.total
    times = f"{speed.ttft.total:>8.2f} s{speed.ttft.bound:>10}{_milliseconds(speed):>12}{speed.tpot.bound:>10}"
    return f"  {speed.policy:<16}{times}{rate:>9.1f}{hits:>8}"


def _milliseconds(speed: Speed) -> str:
    return f"{1e3 * speed.tpot.total:.2f} ms"
