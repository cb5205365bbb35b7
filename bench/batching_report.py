"""A result of bench_batching.py in Markdown, and its promises."""

from __future__ import annotations

from typing import Any

from harness import Target
from report import table

Result = dict[str, Any]
OF_BATCH = 8
SPEEDUPS = {"disk": 1.5, "resident": 2.0}
OVER_BOUND, GOODPUT = 1.15, 1.5


def targets(result: Result) -> list[dict[str, Any]]:
    """What sharing a pass was promised to be worth; None where that batch, or that rate, was not measured."""
    row = next((row for row in result["rows"] if row["batch"] == OF_BATCH), None)
    speedup, over = (row["speedup"], row["over_bound"]) if row else (None, None)
    fcfs, slo = (result["goodput"][name]["goodput"] for name in ("fcfs", "slo"))
    ratio = slo / fcfs if slo and fcfs else None
    spread = "{:.2f}-{:.2f}x over the rounds".format(*row["speedup_range"]) if row else ""
    bound = f"set by the {row['bound']}" if row else ""
    found = [
        Target(f"tok/s, batch {OF_BATCH} / batch 1", speedup, SPEEDUPS[result["experts"]], True, "x", spread),
        Target(f"step of batch {OF_BATCH} / its bound", over, OVER_BOUND, False, "x", bound),
        Target("goodput, by slack / first come first served", ratio, GOODPUT, True, "x"),
    ]
    return [target.to_dict() for target in found]


def render(result: Result) -> str:
    """The report."""
    parts = [warnings(result), facts(result), batches(result), goodput(result), verdicts(result), checks(result)]
    return "\n\n".join(part for part in parts if part)


def warnings(result: Result) -> str:
    """What is wrong with these figures, in bold."""
    busiest = max(result["idle"].values())
    found = ["this is `--quick`: it checks the bench and measures nothing"] * result["quick"]
    found += [f"others used {busiest:.0%} of the machine's CPU time"] * (busiest > 0.02)
    found += ["the code was not a commit"] * ("uncommitted" in (result["versions"]["commit"] or "uncommitted"))
    return "\n".join(f"**Warning: {text}.**" for text in found)


def facts(result: Result) -> str:
    """Model, machine, versions, command, ceilings."""
    machine, rates = result["machine"], result["ceilings"]
    software = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    disk = rates["disk_bytes_per_s"]
    ceilings = f"memory {rates['memory_bytes_per_s'] / 1e9:.1f} GB/s"
    ceilings += "" if disk is None else f", disk {disk / 1e9:.2f} GB/s in reads of {rates['slot_bytes'] / 1e6:.2f} MB"
    rows = [
        f"{result['model']}, {result['slots']} of {result['total_experts']} experts in slots, policy "
        f"{result['policy']}; {result['prompt_tokens']} prompt tokens, {result['new_tokens']} new ones, greedy.",
        f"{machine['cpu']}, {machine['cores']} cores, {result['threads']} threads, {', '.join(machine['isa'])}; "
        f"ceilings of the same run: {ceilings}.",
        f"{software}; {result['date']}, {result['seconds']:.0f} s: `{result['command']}`.",
        "Sizes in turn, round by round, one warm-up round discarded; medians. A bound counts missing experts at the "
        "disk's rate, or used experts and dense weights (without the embedding) once at the memory's.",
    ]
    return "\n".join(f"- {row}" for row in rows)


def batches(result: Result) -> str:
    """A row for each batch size."""
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
        for row in result["rows"]
    ]
    return table(head, rows)


def goodput(result: Result) -> str:
    """What was tried of each scheduler, in the order of the search."""
    found = result["goodput"]
    rows = [
        [
            name,
            "none" if found[name]["goodput"] is None else f"{found[name]['goodput']:.2f}",
            ", ".join(f"{trial['rate']:.2f}: {trial['attained']:.0%}" for trial in found[name]["tried"]),
        ]
        for name in ("fcfs", "slo")
    ]
    objectives = f"TTFT {found['ttft_objective_s']:.3f} s, TPOT {1e3 * found['tpot_objective_s']:.1f} ms"
    return f"Objectives: {objectives}, the same for both.\n\n" + table(
        ["scheduler", "goodput, requests/s", "requests/s: inside both objectives"], rows
    )


def verdicts(result: Result) -> str:
    """Every promise."""
    rows = [[t["name"], t["asked"], t["verdict"], t["detail"]] for t in result["targets"]]
    return table(["target", "asked", "verdict", ""], rows)


def checks(result: Result) -> str:
    """What must hold for any of this to count."""
    said = {True: "passed", False: "FAILED"}
    rows = [f"{check['name']}: {said[check['passed']]} ({check['equal']} equal)" for check in result["checks"]]
    rows.append(f"without `invariant`, {result['equal_by_default']} of {result['prompts']} prompts had equal tokens")
    return "\n".join(f"- {row}" for row in rows)
