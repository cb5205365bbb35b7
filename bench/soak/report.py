"""A result of bench_soak.py: its checks, and Markdown.

PYTHONPATH=bench python -m soak.report RESULT.json > RESULT.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tables
from tables import not_idle, table

Result = dict[str, Any]
GROWN_BYTES = 16 << 20  # an allocator's arenas breathe; a leak of 2 kB a request is more than that
NOT_MEASURED = "not measured: nobody looked at the second quarter of requests"
SPARE = 8  # a pool of threads may still grow, a connection may still close


def checks(result: Result) -> list[dict[str, Any]]:
    """What a server must keep to; all of it."""
    tally, service, memory, end = (result[name] for name in ("tally", "service", "memory", "end"))
    ended = tally["ended"]
    total, refused = sum(ended.values()), service["refused"]
    kept, errors = service["finished"], service["finished"].get("error", 0)
    files, threads, compared = memory["more_files"], memory["more_threads"], memory["grown_bytes"] is not None
    done = kept.get("stop", 0) + kept.get("length", 0)
    found = [
        ("every request ended as it should", tally["num_faults"] == 0 and total == result["asked"], _faults(tally)),
        (
            "texts are those made alone",
            tally["choices"] > 0 and tally["num_faults"] == 0,
            f"{tally['choices']} choices",
        ),
        ("nothing failed or was refused", errors == refused == 0, f"{errors} errors, {refused} refused"),
        ("what was served was finished", done >= tally["choices"], f"{done} finished, {kept.get('abort', 0)} given up"),
        ("nothing runs, waits or has pages", _rests(service), f"KV cache {service['kv_usage']:.0%}"),
        ("check_integrity()", end["integrity"] == "nothing is left", str(end["integrity"])),
        ("memory is flat", compared and memory["grown_bytes"] <= GROWN_BYTES, _memory(memory)),
        (
            "files and threads too",
            compared and files <= SPARE and threads <= SPARE,
            f"{files:+} and {threads:+}" if compared else NOT_MEASURED,
        ),
        ("healthy to the end", service["health"] == 200, f"/health {service['health']}"),
        ("SIGTERM ends it", end["exit_code"] == 0 and not end["stderr"], _end(end)),
    ]
    return [{"name": name, "passed": bool(passed), "detail": detail} for name, passed, detail in found]


def render(result: Result) -> str:
    """The report."""
    parts = [warnings(result), facts(result), shares(result), verdicts(result), faults(result)]
    return "\n\n".join(part for part in parts if part)


def warnings(result: Result) -> str:
    """What is wrong with this run, in bold."""
    quick = ["this is `--quick`: it checks the bench"] * result["quick"]
    return tables.warnings(result, quick + not_idle(max(result["idle"].values())))


def facts(result: Result) -> str:
    """The load, the machine, the versions."""
    machine = result["machine"]
    rows = [
        f"{result['asked']} requests to {result['model']}, a quarter of its experts in slots and the others on the "
        f"disk, `invariant`; {result['at_once']} clients at once for a batch of {result['batch']}; {result['kinds']} "
        "different prompts of 1 to 400 characters, up to 8 tokens each.",
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['isa'])}; server and clients share them.",
        tables.provenance(result),
    ]
    return "\n".join(f"- {row}" for row in rows)


def shares(result: Result) -> str:
    """Who asked, and how fast they were answered: how hard the load was, not how fast a server can be."""
    tally, seconds = result["tally"], result["load_seconds"]
    total = sum(tally["ended"].values())
    rows = [(fate, str(number), f"{number / total:.1%}") for fate, number in sorted(tally["ended"].items())]
    rate = f"{total / seconds:.1f} requests/s and {tally['tokens'] / seconds:.0f} tokens/s over {seconds:.0f} s"
    waits = ", ".join(
        f"{name} {tally[key]['p50']:.2f} s (median) and {tally[key]['p95']:.2f} s (95 %)"
        for name, key in (("first piece of a stream", "ttft_s"), ("whole answer", "whole_s"))
        if tally[key]
    )
    return f"{table(['requests', 'number', 'share'], rows)}\n\n{rate}; {waits}."


def verdicts(result: Result) -> str:
    """The checks."""
    said = {True: "passed", False: "**FAILED**"}
    return table(["check", "", ""], [(one["name"], said[one["passed"]], one["detail"]) for one in result["checks"]])


def faults(result: Result) -> str:
    """The first things that went wrong."""
    return "\n".join(f"- {text}" for text in result["tally"]["faults"])


def _rests(service: dict[str, Any]) -> bool:
    return service["running"] == service["waiting"] == 0 and service["kv_usage"] == 0


def _faults(tally: dict[str, Any]) -> str:
    return f"{tally['num_faults']} faults in {sum(tally['ended'].values())} requests"


def _memory(memory: dict[str, Any]) -> str:
    if memory["grown_bytes"] is None:
        return NOT_MEASURED
    early, late, peak = (memory[name] / 1e6 for name in ("early_bytes", "late_bytes", "peak_rss_bytes"))
    grown = memory["bytes_per_1000"] / 1e3
    return f"{early:.1f} MB, then {late:.1f} MB ({grown:+.1f} kB per 1000 requests); peak RSS {peak:.0f} MB"


def _end(end: dict[str, Any]) -> str:
    return f"exit code {end['exit_code']}" + (f", {end['stderr'][-200:]}" if end["stderr"] else "")


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())))
