"""The link between host and GPU: bandwidth by size, pinned and pageable, each way, and reads by a kernel.

    python bench/bench_copy.py [--json OUT] [--tiny]

These are the ceilings that every other figure is held against. ``--tiny`` copies small pieces within the host's memory:
it checks the bench and measures no link. The result file is written after each way, so a run that is cut off keeps
what it has. Without a CUDA GPU and without ``--tiny`` it says so and exits with 3; a copy that changes bytes, or a way
that fails, makes it exit with 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tables
from copy_machines import GpuCopies, HostCopies
from copy_table import SIZES, TINY_SIZES, Way, measure, targets
from gpu_ceilings import gpu_facts
from harness import result_file, write_result
from machine import conditions
from report import table

Result = dict[str, Any]


def run(tiny: bool, out: Path | None) -> Result:
    """The whole result; ``out`` has what there is of it after each way, so a run that is cut off leaves that."""
    began = time.perf_counter()
    result = conditions("bench_copy", tiny)
    result["gpu"] = None if tiny else gpu_facts()

    def save(measured: Result) -> None:
        result.update(measured)
        result["targets"] = [] if tiny else [target.to_dict() for target in targets(result)]
        result["seconds"] = time.perf_counter() - began
        if out:
            write_result(out, result)

    if tiny:
        measure(HostCopies(), TINY_SIZES, save)
    else:
        measure(GpuCopies(), SIZES, save)
    return result


def failed(result: Result) -> bool:
    """Whether a way could not be measured, or changed a byte."""
    unmeasured = any(cell["error"] for cell in result["cells"])
    return unmeasured or any(check["passed"] is not True for check in result["checks"])


def render(result: Result) -> str:
    """The report in Markdown."""
    parts = [warnings(result), facts(result), rates(result), verdicts(result), checks(result)]
    return "\n\n".join(part for part in parts if part)


def warnings(result: Result) -> str:
    """What is wrong with these figures, in bold."""
    found = ["this is `--tiny`, copies within the host: it checks the bench and measures no link"] * result["quick"]
    found += [f"{cell['way']}, {cell['size']}: {cell['error']}" for cell in result["cells"] if cell["error"]]
    return tables.warnings(result, found)


def facts(result: Result) -> str:
    """Machine, versions, command."""
    machine, gpu = result["machine"], result["gpu"]
    rows = [f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}."]
    rows += [f"{gpu['name']}, CUDA {gpu['cuda']}, driver {gpu['driver']}."] if gpu else []
    rows += [tables.provenance(result)]
    rows += ["Different rows in turn, 7 rounds, medians (extremes); pageable copies by the host's clock."]
    return "\n".join(f"- {row}" for row in rows)


def rates(result: Result) -> str:
    """A line a size, a column a way, GB/s."""
    cells = {(cell["size"], cell["way"]): cell for cell in result["cells"]}
    rows = []
    for size in dict.fromkeys(cell["size"] for cell in result["cells"]):
        rows.append([size, *(_rate(cells[size, way.value]["bytes_per_s"]) for way in Way)])
    best = ["best", *(_best(result["ceilings"][way.value]) for way in Way)]
    return table(["GB/s", *(way.value for way in Way)], [*rows, best])


def verdicts(result: Result) -> str:
    """What the runtime's design rests on."""
    rows = [(t["name"], t["asked"], t["verdict"]) for t in result["targets"]]
    return table(["asked of the link", "", "verdict"], rows) if rows else ""


def checks(result: Result) -> str:
    """Whether bytes arrived."""
    words = {True: "passed", False: "**FAILED**", None: "not checked"}
    return table(["check", "", ""], [(c["name"], words[c["passed"]], c["detail"]) for c in result["checks"]])


def _rate(summary: dict[str, float] | None) -> str:
    if summary is None:
        return "not measured"
    return f"{summary['median'] / 1e9:.2f} ({summary['low'] / 1e9:.2f}-{summary['high'] / 1e9:.2f})"


def _best(rate: float | None) -> str:
    return "not measured" if rate is None else f"{rate / 1e9:.2f}"


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file, help="write all figures to this file")
    parser.add_argument("--tiny", action="store_true", help="small copies within the host: a check of the bench")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("bench_copy: no CUDA GPU: nothing was measured")
        return 3
    result = run(args.tiny, args.json)
    print(render(result))
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
