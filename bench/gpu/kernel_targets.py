"""What the project promises of its kernels, held against a result of ``bench_kernels``.

On an H100 SXM the promises are microseconds, which stand on its rates; on any other GPU, an H100 PCIe or NVL too, they
are shares of the ceilings that the same run measured. What was not measured has no value, and so is neither reached nor
missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu.moe_shapes import CASES, QWEN3, LayerCase, Rates
from harness import Target

DECODE_SHARE, PREFILL_SHARE = 0.85, 0.60  # of the copy's bandwidth, of cuBLAS's rate
ROUTE_PLAN_US = 4.0
MISS_ALLOWANCE_US = 8.0
INDIRECTION_PERCENT = 1.0
NEVER_SLOWER_THAN = ("F.grouped_mm", "transformers grouped_mm", "transformers batched_mm")
PLAN_TOKENS = (1, 4, 16)
H100_SXM = "H100 80GB HBM3"  # in its name: a PCIe card is "H100 PCIe"

Result = dict[str, Any]
Row = dict[str, Any]


def plan_name(tokens: int) -> str:
    """How a row of ``route_plan`` by itself is called."""
    return f"route_plan, {tokens} token{'s' if tokens > 1 else ''} of {QWEN3.name}"


def rates_of(result: Result) -> Rates | None:
    """The ceilings of the same run; None where they were not measured."""
    found = result["ceilings"]
    return found and Rates(found["copy_bytes_per_s"], found["matmul_flop_per_s"])


def rows_of(result: Result, section: str) -> list[tuple[str, Row]]:
    """(name of its part, row) of everything that was measured in a section."""
    return [(part["name"], row) for part in result["parts"] if part["section"] == section for row in part["rows"]]


def layer_row(result: Result, case: LayerCase) -> Row | None:
    """The measured whole layer of ``case``."""
    found = [row for name, row in rows_of(result, "layers") if name == case.name and row["what"] == "layer"]
    return found[0] if found else None


def share_of_floor(row: Row, rates: Rates | None) -> float | None:
    """The floor of what the row moved and computed over its time; None where either is not known."""
    if rates is None or not (row["nbytes"] or row["flop"]):
        return None
    return rates.floor_us(row["nbytes"], row["flop"]) / row["us"]["median"]


def targets(result: Result) -> list[Target]:
    """All promises with their verdicts; those of ``--quick`` are of other sizes, so none is held against it."""
    measured = result if not result["quick"] else result | {"parts": [], "ceilings": None}
    return [
        *(target for case in CASES if (target := layer_target(measured, case))),
        *(peer_target(measured, case) for case in CASES if case.format == "bf16"),
        *(_plan_target(measured, tokens) for tokens in PLAN_TOKENS),
        *_miss_targets(measured),
        *_indirection_targets(measured),
    ]


def layer_target(result: Result, case: LayerCase) -> Target | None:
    """On an H100 SXM the table's microseconds (None where it asks nothing), elsewhere the share of the ceiling."""
    row = layer_row(result, case)
    if _is_h100_sxm(result):
        if case.target_us is None:
            return None
        unit, scale = (" ms", 1e-3) if case.is_prefill else (" us", 1.0)
        time = row and scale * row["us"]["median"]
        return Target(case.name, time, scale * case.target_us, at_least=False, unit=unit)
    share = share_of_floor(row, rates_of(result)) if row else None
    limit = PREFILL_SHARE if case.is_prefill else DECODE_SHARE
    return Target(f"{case.name}: share of the floor", share, limit, at_least=True, unit="")


def peer_target(result: Result, case: LayerCase) -> Target:
    """Against the fastest of those that it must never be slower than."""
    row = layer_row(result, case) or {"peers": {}}
    ratios = {name: row["peers"][name]["ratio"]["median"] for name in NEVER_SLOWER_THAN if name in row["peers"]}
    best = min(ratios, key=lambda name: ratios[name]) if ratios else None
    detail = f"the fastest is {best}" if best else ""
    return Target(f"{case.name}: speed over peers", best and ratios[best], 1.0, at_least=True, unit="x", detail=detail)


def _plan_target(result: Result, tokens: int) -> Target:
    times = [row["us"]["median"] for _, row in rows_of(result, "small ops") if row["what"] == plan_name(tokens)]
    return Target(plan_name(tokens), times[0] if times else None, ROUTE_PLAN_US, at_least=False, unit=" us")


def _miss_targets(result: Result) -> Iterator[Target]:
    """What read-through takes beyond the time that the link needs for the expert's bytes."""
    name, found = "one decode miss, beyond the time of the link", rows_of(result, "miss")
    for part, row in found:
        beyond = row["us"]["median"] - link_us(result, row) if result["ceilings"] else None
        yield Target(f"{name}: {part}", beyond, MISS_ALLOWANCE_US, at_least=False, unit=" us")
    if not found:
        yield Target(name, None, MISS_ALLOWANCE_US, at_least=False, unit=" us")


def _indirection_targets(result: Result) -> Iterator[Target]:
    name, found = "slot indirection, slower than contiguous weights by", rows_of(result, "indirection")
    for part, row in found:
        percent = 100 * (1 / row["peers"]["contiguous weights"]["ratio"]["median"] - 1)
        yield Target(f"{name}: {part}", percent, INDIRECTION_PERCENT, at_least=False, unit=" %")
    if not found:
        yield Target(name, None, INDIRECTION_PERCENT, at_least=False, unit=" %")


def link_us(result: Result, row: Row) -> float:
    """What the link needs for the row's bytes, at the rate of the same run."""
    return float(1e6 * row["link_bytes"] / result["ceilings"]["link_bytes_per_s"])


def _is_h100_sxm(result: Result) -> bool:
    """The table's microseconds are asked of an H100 SXM only; without a GPU they are shown as what is asked."""
    return result["gpu"] is None or H100_SXM in result["gpu"]["name"]
