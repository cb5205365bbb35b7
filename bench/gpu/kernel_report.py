"""A result of ``bench_kernels`` as Markdown: ``PYTHONPATH=bench python -m gpu.kernel_report RESULT.json [--short]``.

``--short`` leaves out the kernels by themselves and the list of targets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables
from gpu.kernel_targets import (
    Result,
    Row,
    layer_row,
    layer_target,
    link_us,
    rates_of,
    rows_of,
    share_of_floor,
    targets,
)
from gpu.moe_shapes import CASES, H100, LayerCase
from harness import Target
from tables import spread, table

NOT_MEASURED = "not measured"
NOTHING_MEASURED = "**No CUDA GPU was found: nothing was measured. Floors and targets are those of an H100.**"


def render(result: Result, short: bool = False) -> str:
    """The whole report; ``short``: without the kernels by themselves and the list of targets."""
    parts = [warnings(result), _conditions(result), ceilings(result), layers(result), peers(result), beside(result)]
    parts += [checks(result)] if short else [single_kernels(result), verdicts(result), checks(result)]
    return "\n\n".join(part for part in parts if part)


def warnings(result: Result) -> str:
    """What was not measured and why, first and in bold."""
    if result["gpu"] is None and all(part["status"] == "not measured" for part in result["parts"]):
        return NOTHING_MEASURED
    found = ["this is `--quick`, tiny experts: it checks the bench and measures nothing"] if result["quick"] else []
    for part in result["parts"]:
        if part["status"] in ("failed", "skipped"):
            found.append(f"{part['section']}, {part['name']}: {part['status']}: {_last_line(part['error'])}")
        found += [f"{part['section']}: failed: {error}" for error in part["errors"]]
    return tables.warnings(result, found)


def _conditions(result: Result) -> str:
    """Machine, versions, command, and how it was timed."""
    machine, gpu = result["machine"], result["gpu"]
    rows = [f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}."]
    if gpu:
        rows[:0] = [
            f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')}), {gpu['multiprocessors']} multiprocessors, "
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['l2_bytes'] / 2**20:.0f} MiB of L2, "
            f"CUDA {gpu['cuda']}, driver {gpu['driver']}."
        ]
        rows.append(
            "Even routing, all experts resident, CUDA graph replay over at least 3 times the L2 of slots; medians "
            "(extremes) of replays in turn; weights and outputs were checked first."
        )
    rows += [tables.provenance(result)]
    rows += [f"{name}: {said}." for name, said in result["others"].items()]
    return "\n".join(f"- {row}" for row in rows)


def ceilings(result: Result) -> str:
    """The rates of the same run beside those of the H100 that the floors stand on."""
    found = result["ceilings"] or {}
    lines = [
        ("copy in device memory, read + written", "copy_bytes_per_s", 1e9, "GB/s", f"{H100.bytes_per_s / 1e9:.0f}"),
        ("bf16 product of 8192^3, cuBLAS", "matmul_flop_per_s", 1e12, "TFLOP/s", f"{H100.flop_per_s / 1e12:.0f}"),
        ("pinned host memory to device", "link_bytes_per_s", 1e9, "GB/s", ""),
        ("an empty kernel in a graph", "empty_kernel_us", 1.0, "us", ""),
    ]
    rows = [
        (what, unit, f"{found[key] / scale:.1f}" if found else NOT_MEASURED, published)
        for what, key, scale, unit, published in lines
    ]
    return table(["ceiling", "unit", "this run", "H100, published"], rows)


def layers(result: Result) -> str:
    """The table of whole layers: floors and targets, and what was reached."""
    head = ["routed layer, us", "floor, H100", "target", "best published", "measured", "floor, this run"]
    head += ["of the floor", "TFLOP/s", "verdict"]
    return table(head, [_layer_line(result, case) for case in CASES])


def _layer_line(result: Result, case: LayerCase) -> Sequence[str]:
    row, rates = layer_row(result, case), rates_of(result)
    known = [case.name, _number(case.expected_floor_us(H100)), _number(case.target_us), case.published or "-"]
    if row is None:
        return [*known, NOT_MEASURED, "-", "-", "-", NOT_MEASURED]
    floor = rates.floor_us(row["nbytes"], row["flop"]) if rates else None
    speed = f"{row['flop'] / row['us']['median'] / 1e6:.0f}" if case.is_prefill else "-"
    share = _percent(share_of_floor(row, rates))
    target = None if result["quick"] else layer_target(result, case)
    return [*known, _time(row["us"]), _number(floor), share, speed, target.verdict() if target else "-"]


def peers(result: Result) -> str:
    """What others took for the same layer, and how much longer that is."""
    found = [(name, row) for name, row in rows_of(result, "layers") if row["peers"] or row["failed"]]
    names = list(dict.fromkeys(peer for _, row in found for peer in (*row["peers"], *row["failed"])))
    rows = [(name, _number(row["us"]["median"]), *(_peer(row, peer) for peer in names)) for name, row in found]
    return table(["peers, us (times ours)", "duoserve", *names], rows) if rows else ""


def _peer(row: Row, name: str) -> str:
    if name not in row["peers"]:
        return row["failed"].get(name, "-")
    peer = row["peers"][name]
    return f"{_number(peer['us']['median'])} ({peer['ratio']['median']:.2f}x{'' if peer['graph'] else ', no graph'})"


def beside(result: Result) -> str:
    """Indirection, the decode miss, attention and the small ops."""
    rows = []
    for section in ("indirection", "miss", "attention", "small ops"):
        for part, row in rows_of(result, section):
            name = row["what"] if section in ("attention", "small ops") else f"{row['what']}, {part}"
            others = "; ".join(f"{peer} {_peer(row, peer)}" for peer in row["peers"])
            rows.append((name, _time(row["us"]), _floor(result, row), others or "-"))
    return table(["op, us", "measured", "floor, this run", "beside it"], rows) if rows else ""


def single_kernels(result: Result) -> str:
    """Every kernel of the layers by itself."""
    rates = rates_of(result)
    rows = [
        (name, row["what"], _time(row["us"]), _floor(result, row), _percent(share_of_floor(row, rates)))
        for name, row in rows_of(result, "layers")
        if row["what"] != "layer"
    ]
    return table(["layer", "kernel", "us", "floor, this run", "of the floor"], rows) if rows else ""


def _floor(result: Result, row: Row) -> str:
    rates = rates_of(result)
    if rates is None:
        return "-"
    if "link_bytes" in row:
        return f"{_number(link_us(result, row))} (link)"
    launch, floor = result["ceilings"]["empty_kernel_us"], rates.floor_us(row["nbytes"], row["flop"])
    return f"{_number(launch)} (a launch)" if floor < launch else _number(floor)


def verdicts(result: Result) -> str:
    """Every promise."""
    return table(["target", "asked", "verdict", ""], [_verdict(target) for target in targets(result)])


def _verdict(target: Target) -> Sequence[str]:
    return target.name, target.asked(), target.verdict(), target.detail


def checks(result: Result) -> str:
    """How the correctness checks of the same run went; those that failed by name."""
    found = [(part["name"], check) for part in result["parts"] for check in part["checks"]]
    failed = [f"{name}, {check['name']} ({check['error']:.2e})" for name, check in found if not check["passed"]]
    counts = f"Correctness checks in the same run: {len(found) - len(failed)} passed, {len(failed)} failed"
    return f"{counts}{': ' if failed else ''}{'; '.join(failed)}." if result["gpu"] else ""


def _time(microseconds: dict[str, float]) -> str:
    """Median (extremes)."""
    return spread(microseconds, "{:.0f}" if microseconds["median"] >= 1000 else "{:.4g}")


def _number(value: float | None) -> str:
    """Four digits, and none after the point from a thousand on."""
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _last_line(text: str | None) -> str:
    """Of a traceback: what was raised."""
    return (text or "").strip().rpartition("\n")[2]


def main() -> None:
    """Prints the report of a result file, whole or partial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what bench_kernels.py --json wrote")
    parser.add_argument("--short", action="store_true", help="without the kernels by themselves and the targets")
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.result.read_text())
    print(render(result, args.short))


if __name__ == "__main__":
    main()
