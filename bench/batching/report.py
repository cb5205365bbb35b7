"""A result of bench_batching.py in Markdown, and its promises.

    PYTHONPATH=bench python -m batching.report RESULT.json > RESULT.md

prints it anew, and draws its curves anew beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tables
from batching import plot as batching_plot
from batching.goodput_search import ATTAINED
from harness import Target
from tables import not_idle, table

Result = dict[str, Any]
OF_BATCH = 8
SPEEDUPS = {"disk": 1.5, "resident": 2.0}
OVER_BOUND, GOODPUT = 1.15, 1.5
NAMES = {"disk": "a quarter of the experts in slots", "resident": "all experts in slots"}


def targets(result: Result) -> list[dict[str, Any]]:
    """What sharing a pass was promised to be worth; None where that batch, or that rate, was not measured."""
    found = [target for cell in result["cells"] for target in _decode_targets(cell)]
    found += [_goodput_target(served) for served in result["goodput"]]
    return [target.to_dict() for target in found]


def _decode_targets(cell: Result) -> Iterator[Target]:
    row = next((row for row in cell["rows"] if row["batch"] == OF_BATCH), None)
    speedup, over = (row["speedup"], row["over_bound"]) if row else (None, None)
    spread = "{:.2f}-{:.2f}x over the rounds".format(*row["speedup_range"]) if row else ""
    of = f"{cell['model']}, {cell['experts']}"
    yield Target(f"{of}: tok/s, batch {OF_BATCH} / batch 1", speedup, SPEEDUPS[cell["experts"]], True, "x", spread)
    set_by = f"set by the {row['bound']}" if row else ""
    yield Target(f"{of}: step of batch {OF_BATCH} / its bound", over, OVER_BOUND, False, "x", set_by)


def _goodput_target(served: Result) -> Target:
    fcfs, slo = (served[name]["goodput"] for name in ("fcfs", "slo"))
    ratio, detail = slo / fcfs if slo and fcfs else None, ""
    lowest = served["fcfs"]["tried"][0]
    if slo and fcfs is None and lowest["attained"] < ATTAINED and slo / lowest["rate"] >= GOODPUT:
        ratio = slo / lowest["rate"]
        detail = f"at least: first come first served has none from {lowest['rate']:.2f} requests/s on; "
    name = f"{served['model']}, disk: goodput, by slack / first come first served"
    return Target(name, ratio, GOODPUT, True, "x", f"{detail}trials of {served['seconds']:.0f} s")


def judged(cells: list[Result]) -> list[dict[str, Any]]:
    """What must hold for any of this to count."""
    return [
        {
            "name": f"{cell['model']}, {cell['experts']}, invariant, one thread: tokens alone and in a batch",
            "passed": cell["equal_if_invariant"] == cell["prompts"],
            "equal": cell["equal_if_invariant"],
        }
        for cell in cells
    ]


def render(result: Result, picture: str | None = None) -> str:
    """The report; ``picture`` is a link to its curves."""
    parts = [warnings(result), facts(result), f"![curves]({picture})" if picture else ""]
    parts += [batches(cell) for cell in result["cells"]] + [goodput(served) for served in result["goodput"]]
    parts += [verdicts(result), checks(result)]
    return "\n\n".join(part for part in parts if part)


def warnings(result: Result) -> str:
    """What is wrong with these figures, in bold."""
    quick = ["this is `--quick`: it checks the bench and measures nothing"] * result["quick"]
    return tables.warnings(result, quick + not_idle(max(result["idle"].values())))


def facts(result: Result) -> str:
    """Machine, versions, command, and how to read the tables."""
    machine = result["machine"]
    rows = [
        f"{machine['cpu']}, {machine['cores']} cores, {result['threads']} threads, {', '.join(machine['isa'])}; "
        f"decode steps {'compiled' if result['decode_mode'] == 'compiled' else 'op by op'}.",
        tables.provenance(result),
        "Sizes in turn, round by round, one warm-up round discarded; medians. A bound counts missing experts at the "
        "disk's rate, or used experts and dense weights (without the embedding) once at the memory's.",
    ]
    return "\n".join(f"- {row}" for row in rows)


def batches(cell: Result) -> str:
    """A row for each batch size."""
    rates = cell["ceilings"]
    disk = rates["disk_bytes_per_s"]
    ceilings = f"memory {rates['memory_bytes_per_s'] / 1e9:.1f} GB/s"
    ceilings += "" if disk is None else f", disk {disk / 1e9:.2f} GB/s in reads of {rates['slot_bytes'] / 1e6:.2f} MB"
    said = (
        f"**{cell['model']}, {NAMES[cell['experts']]}** ({cell['slots']} of {cell['total_experts']}), policy "
        f"{cell['policy']}; {cell['prompt_tokens']} prompt tokens, {cell['new_tokens']} new ones, greedy; ceilings of "
        f"the same run: {ceilings}."
    )
    head = ["batch", "tok/s", "over batch 1", "step ms", "ITL p95 ms", "experts", "missing", "bound ms", "step / bound"]
    rows = [
        [
            str(row["batch"]),
            f"{row['tok_s']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['step_ms']:.2f}",
            f"{row['itl_p95_ms']:.2f}",
            f"{row['experts_per_step']:.1f}",
            f"{row['misses_per_step']:.1f}",
            f"{row['bound_ms']:.2f} ({row['bound']})",
            f"{row['over_bound']:.2f}x",
        ]
        for row in cell["rows"]
    ]
    return f"{said}\n\n{table(head, rows)}"


def goodput(served: Result) -> str:
    """Every trial of each scheduler."""
    alone = served["alone"]
    said = (
        f"**{served['model']}, a quarter of the experts in slots, as a service**: trials of {served['seconds']:.0f} s, "
        f"prompts of {served['mean_prompt']:.0f} and answers of {served['mean_tokens']:.0f} tokens on average. "
        f"Objectives, the same for both: TTFT {served['ttft_objective_s']:.3f} s, TPOT "
        f"{1e3 * served['tpot_objective_s']:.1f} ms; alone a request has {alone['ttft_s']:.3f} s and "
        f"{1e3 * alone['tpot_s']:.1f} ms."
    )
    head = [
        "scheduler",
        "requests/s",
        "requests",
        "inside both",
        "TTFT met",
        "TPOT met",
        "TTFT p95 s",
        "TPOT p95 ms",
        "goodput",
    ]
    rows = []
    for name in ("fcfs", "slo"):
        reached = served[name]["goodput"]
        for trial in served[name]["tried"]:
            shares = [f"{trial[key]:.0%}" for key in ("attained", "first_in_time", "later_in_time")]
            latencies = [f"{trial['ttft_p95_s']:.3f}", f"{1e3 * trial['tpot_p95_s']:.1f}"]
            rows.append(
                [batching_plot.NAMES[name], f"{trial['rate']:.2f}", str(trial["requests"]), *shares, *latencies, ""]
            )
        rows[-1][-1] = "none" if reached is None else f"{reached:.2f} requests/s"
    return f"{said}\n\n{table(head, rows)}"


def verdicts(result: Result) -> str:
    """Every promise."""
    rows = [[t["name"], t["asked"], t["verdict"], t["detail"]] for t in result["targets"]]
    return table(["target", "asked", "verdict", ""], rows)


def checks(result: Result) -> str:
    """Of every cell, how many prompts had equal tokens alone and in a batch."""
    said = {True: "passed", False: "FAILED"}
    rows = [f"{check['name']}: {said[check['passed']]} ({check['equal']} equal)" for check in result["checks"]]
    for cell in result["cells"]:
        equal = f"{cell['equal_by_default']} of {cell['prompts']} prompts had equal tokens"
        rows.append(f"{cell['model']}, {cell['experts']}, without `invariant`: {equal}")
    return "\n".join(f"- {row}" for row in rows)


def main() -> None:
    """Prints the report of a file and draws its curves."""
    path = Path(sys.argv[1])
    result = json.loads(path.read_text())
    picture = path.with_suffix(".svg")
    batching_plot.draw(picture, result)
    print(render(result, picture.name))


if __name__ == "__main__":
    main()
