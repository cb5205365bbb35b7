"""From what a cell measured to the figures of its row, the checks over all rows, and the verdicts.

A link bound is bytes over the rate of pinned copies, a compute bound operations over the rate of a large product, a
memory bound bytes that must be read over the rate of a copy; all rates are from the same run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from duoserve.metrics import percentile
from harness import Target
from serve.cells import BASE, EVENT, GRAPH, PAPER_SHARE, PROMPTS, Cell
from serve.models import BF16
from serve.steps import host_seconds

Row = dict[str, Any]
Result = dict[str, Any]

TTFT_LIMIT, TPOT_LIMIT = 1.05, 1.10
HOST_US_PER_LAYER, HOST_US_PER_STEP = 40.0, 100.0  # in event mode, in graph mode
ODF_TTFT, ODF_END_TO_END, END_TO_END_TOKENS = 5.34, 7.55, 64
# FreeToken's published cost of a token of Qwen3-30B-A3B in bf16, with the link that it was measured on.
FREETOKEN_FIXED_S, FREETOKEN_MISS_S, FREETOKEN_LINK = 5.44e-3, 0.194e-3, 46.7e9
FREETOKEN_READ_BYTES, FREETOKEN_MEMORY = 6.7e9, 1.79e12  # of a step with all experts there; an RTX 5090's


def figures(measured: dict[str, Any], ceilings: dict[str, float]) -> Row:
    """The row of one cell."""
    before, stats, steps, batch = measured["prefill"], measured["stats"], measured["steps"], measured["batch"]
    copied, needed = before["bytes_total"], measured["needed_bytes"]
    link = ceilings["link_bytes_per_s"]
    decode_s = stats["wall_s"] - before["wall_s"]
    decode_bytes = stats["bytes_total"] - copied
    hits, misses = stats["hits_decode"], stats["misses_decode"]
    joules = measured["joules"]
    tpot_bound_s = max(misses * measured["slot_bytes"] / link, _read_bytes(measured) / ceilings["memory_bytes_per_s"])
    host_s = host_seconds(measured["timed"]) if measured["timed"] else (None, None)
    return {
        "ttft_s": stats["ttft_s"],
        "ttft_bound_s": max(needed / link, measured["flop"] / ceilings["flop_per_s"]),
        "prefill_link_share": copied / link / stats["ttft_s"],
        "prefill_unneeded_share": max(0.0, 1 - needed / copied) if copied else 0.0,
        "prefill_stall_share": before["stall_s"] / before["wall_s"],
        "tpot_p50_s": percentile(stats["itl_s"], 50),
        "tpot_p95_s": percentile(stats["itl_s"], 95),
        "tpot_mean_s": decode_s / steps,
        "tpot_bound_s": tpot_bound_s / steps,
        "tok_s": batch * steps / decode_s,
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "misses_per_step": misses / steps,
        "decode_bytes_per_s": decode_bytes / decode_s,
        "decode_link_share": decode_bytes / decode_s / link,
        "decode_stall_share": (stats["stall_s"] - before["stall_s"]) / decode_s,
        "wasted_share": stats["bytes_wasted"] / stats["bytes_total"] if stats["bytes_total"] else 0.0,
        "peak_bytes": measured["peak_bytes"],
        "planned_bytes": measured["planned_bytes"],
        "joules_per_token": None if None in joules else (joules[2] - joules[1]) / (batch * steps),
        "host_s_per_step": host_s[0],
        "host_s_per_recorded_step": host_s[1],
    }


def _read_bytes(measured: dict[str, Any]) -> float:
    """Bytes of weights that the decode steps read in device memory."""
    return measured["asked"] * measured["slot_bytes"] + measured["steps"] * measured["dense_active_bytes"]


def checks(parts: Iterable[dict[str, Any]]) -> list[Row]:
    """Equal bits within a group, the tape's experts and no others asked for, and the plan kept."""
    done = _measured(parts)
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for part in done:
        groups.setdefault(Cell(**part["cell"]).group, []).append(part["measured"])
    found = []
    for (model, prompt, batch), measured in groups.items():
        where = f"{model}, prompt {prompt} x {batch}"
        cells = f"{len(measured)} cells"
        found.append(_check(f"equal logits: {where}", same_bits(measured, "logits"), cells))
        found.append(_check(f"equal logits of decode steps: {where}", same_bits(measured, "decoded_logits"), cells))
        found.append(_check(f"equal tokens: {where}", same_tokens(measured), cells))
    asked = [part["name"] for part in done if not asks_for_the_tape(part["measured"])]
    found.append(_check("experts asked for are the tape's", not asked, "; ".join(asked) or f"{len(done)} cells"))
    late = [part["name"] for part in done if part["measured"]["recorded_while_timed"]]
    found.append(_check("nothing was recorded while it was timed", not late, "; ".join(late) or f"{len(done)} cells"))
    over = [part["name"] for part in done if not keeps_the_plan(part["measured"])]
    counted = [part for part in done if part["measured"]["peak_bytes"] is not None]
    found.append(
        _check("peak memory / plan", not over if counted else None, "; ".join(over) or f"{len(counted)} cells")
    )
    return found


def same_bits(measured: Sequence[dict[str, Any]], which: str) -> bool | None:
    """Whether all logits that ``which`` names are finite and equal; None where there is nothing to compare."""
    digests = {one[which] for one in measured}
    if "not finite" in digests:
        return False
    return None if len(measured) < 2 else len(digests) == 1


def same_tokens(measured: Sequence[dict[str, Any]]) -> bool | None:
    """Whether each row's tokens are the same as far as both go; None where there is nothing to compare."""
    rows = [row for rows in zip(*(one["tokens"] for one in measured), strict=True) for row in _with_longest(rows)]
    return None if len(measured) < 2 else all(tokens == longest[: len(tokens)] for tokens, longest in rows)


def _with_longest(rows: Sequence[list[int]]) -> list[tuple[list[int], list[int]]]:
    longest = max(rows, key=len)
    return [(tokens, longest) for tokens in rows]


def asks_for_the_tape(measured: dict[str, Any]) -> bool:
    """Whether each layer of each decode step asked for the tape's experts, and all were counted.

    Steps that the device carries out ask nobody (``as_taped`` is None): of these only the count is known.
    """
    stats = measured["stats"]
    return measured["as_taped"] is not False and stats["hits_decode"] + stats["misses_decode"] == measured["asked"]


def keeps_the_plan(measured: dict[str, Any]) -> bool:
    """Whether the device held no more than was planned; True where nobody counts."""
    peak = measured["peak_bytes"]
    return peak is None or peak <= measured["planned_bytes"]


def _check(name: str, passed: bool | None, detail: str) -> Row:
    return {"name": name, "passed": passed, "detail": detail}


def targets(parts: Sequence[dict[str, Any]], ceilings: dict[str, float] | None) -> list[Target]:
    """What is asked of the runtime, model by model; not measured stays not measured."""
    models = list(dict.fromkeys(part["model"] for part in parts))
    return [target for model in models for target in _targets_of(model, parts, ceilings)]


def _targets_of(model: str, parts: Sequence[dict[str, Any]], ceilings: dict[str, float] | None) -> list[Target]:
    mine = [part for part in parts if part["model"] == model]
    single = [p for p in _measured(mine) if (cell := Cell(**p["cell"])).policy == BASE and cell.batch == 1]
    formats = dict.fromkeys((BF16, *(Cell(**part["cell"]).format for part in mine if part.get("cell"))))
    found = [target for form in formats for target in _against_bounds(model, form, single)]
    found += [*_host_time(model, single), *_against_accelerate(model, mine)]
    plain = [part["row"] for part in single if _is_plain(Cell(**part["cell"]))]
    return found + (_against_freetoken(plain, ceilings) if model.startswith("Qwen3") else [])


def _measured(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for part in parts if part["status"] == "measured" and "cell" in part]


def _is_plain(cell: Cell, form: str = BF16) -> bool:
    return cell.policy == BASE and cell.is_whole and cell.batch == 1 and cell.format == form


def _against_bounds(model: str, form: str, single: Sequence[dict[str, Any]]) -> list[Target]:
    rows = [part["row"] for part in single if _is_plain(Cell(**part["cell"]), form)]
    ttft = max((row["ttft_s"] / row["ttft_bound_s"] for row in rows if row["ttft_bound_s"]), default=None)
    tpot = max((row["tpot_mean_s"] / row["tpot_bound_s"] for row in rows), default=None)
    name, cells = model if form == BF16 else f"{model} {form}", f"{len(rows)} cells"
    return [
        Target(f"{name}: TTFT / bound, worst of {BASE}", ttft, TTFT_LIMIT, False, "x", cells),
        Target(f"{name}: TPOT / bound, worst of {BASE}", tpot, TPOT_LIMIT, False, "x", cells),
    ]


def _host_time(model: str, single: Sequence[dict[str, Any]]) -> list[Target]:
    """What the host takes of a step in either launch while the device has nothing to do; the worst cells."""
    whole = [part for part in single if not Cell(**part["cell"]).without and part["measured"]["timed"]]
    event, graph = ([p for p in whole if p["measured"]["launch"] == launch] for launch in (EVENT, GRAPH))
    return [
        _host_target(f"{model}: the host's time, a layer in event mode", event, HOST_US_PER_LAYER, by_layer=True),
        _host_target(f"{model}: the host's time, a step in graph mode", graph, HOST_US_PER_STEP, by_layer=False),
    ]


def _host_target(name: str, parts: Sequence[dict[str, Any]], limit: float, by_layer: bool) -> Target:
    def us(part: dict[str, Any], figure: str) -> float:
        return 1e6 * float(part["row"][figure]) / (part["measured"]["layers"] if by_layer else 1)

    worst = max(parts, key=lambda part: us(part, "host_s_per_step"), default=None)
    if worst is None:
        return Target(name, None, limit, False, " us")
    inside, cells = us(worst, "host_s_per_recorded_step"), f"{len(parts)} cells"
    return Target(name, us(worst, "host_s_per_step"), limit, False, " us", f"{cells}; {inside:.3g} without sampling")


def _against_accelerate(model: str, parts: Sequence[dict[str, Any]]) -> list[Target]:
    """At the paper's memory share; end to end is a prompt of 128 tokens and 64 tokens of output."""
    ours = next((p["row"] for p in parts if "cell" in p and p["status"] == "measured" and _is_paper(p["cell"])), None)
    peer = next((p["measured"] for p in parts if "cell" not in p and p["status"] == "measured"), None)
    ttft = end_to_end = None
    if ours and peer:
        ttft = peer["ttft_s"] / ours["ttft_s"]
        gaps = END_TO_END_TOKENS - 1
        theirs = peer["ttft_s"] + gaps * percentile(peer["itl_s"], 50) if peer["itl_s"] else None
        end_to_end = theirs and theirs / (ours["ttft_s"] + gaps * ours["tpot_mean_s"])
    what = f"accelerate / {BASE} at {PAPER_SHARE}"
    return [
        Target(f"{model}: TTFT, {what}", ttft, ODF_TTFT, True, "x"),
        Target(f"{model}: end to end, {what}", end_to_end, ODF_END_TO_END, True, "x", "64 tokens of output"),
    ]


def _is_paper(cell: dict[str, Any]) -> bool:
    return _is_plain(Cell(**cell)) and cell["share"] == PAPER_SHARE and cell["prompt"] == PROMPTS[0]


def _against_freetoken(rows: Sequence[Row], ceilings: dict[str, float] | None) -> list[Target]:
    """5.44 ms and 0.194 ms a miss, the latter scaled from their link to this one; then the former to this memory."""
    name, details = "Qwen3-30B-A3B: TPOT / FreeToken's cost model", ("at this link", "at this link and memory")
    values: list[float | None] = [None, None]
    if rows and ceilings:
        miss_s = FREETOKEN_MISS_S * FREETOKEN_LINK / ceilings["link_bytes_per_s"]
        read_s = FREETOKEN_READ_BYTES / ceilings["memory_bytes_per_s"] - FREETOKEN_READ_BYTES / FREETOKEN_MEMORY
        values = [
            max(r["tpot_mean_s"] / (fixed_s + r["misses_per_step"] * miss_s) for r in rows)
            for fixed_s in (FREETOKEN_FIXED_S, FREETOKEN_FIXED_S + read_s)
        ]
    return [
        Target(f"{name}, {detail}, worst", value, 1.0, False, "x")
        for detail, value in zip(details, values, strict=True)
    ]
