"""A result of ``bench_copy`` as Markdown: ``PYTHONPATH=bench python -m gpu.copy_report RESULT.json [--short]``.

Of a run that was cut off it says what there is, and of the other ways that they were not measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tables
from gpu.copy_table import Way
from tables import table

NOT_MEASURED = "not measured"

Result = dict[str, Any]


def render(result: Result, short: bool = False) -> str:
    """The report in Markdown; ``short``: without what was checked."""
    parts = [warnings(result), facts(result), rates(result), verdicts(result)] + [checks(result)] * (not short)
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
        rows.append([size, *(_rate(cells.get((size, way.value))) for way in Way)])
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


def _rate(cell: dict[str, Any] | None) -> str:
    summary = cell and cell["bytes_per_s"]
    if summary is None:
        return NOT_MEASURED
    return f"{summary['median'] / 1e9:.2f} ({summary['low'] / 1e9:.2f}-{summary['high'] / 1e9:.2f})"


def _best(rate: float | None) -> str:
    return NOT_MEASURED if rate is None else f"{rate / 1e9:.2f}"


def main() -> None:
    """Prints the report of a result file, whole or partial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what bench_copy.py --json wrote")
    parser.add_argument("--short", action="store_true", help="without what was checked")
    args = parser.parse_args()
    print(render(json.loads(args.result.read_text()), args.short))


if __name__ == "__main__":
    main()
