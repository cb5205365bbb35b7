"""The kernels on a GPU, beside their floors, their targets and their peers, in one run.

    python bench/bench_kernels.py [--quick] [--json OUT] [--seconds 280]

Times whole routed layers (plan, up, down, combine) and each kernel by itself under CUDA graph replay, after a check of
the same operands against the PyTorch twins and float64; then slot indirection, a decode miss, decode attention and the
small fused ops. The GPU's ceilings are measured in the same run. The result file is written after every part, so a run
that is cut short leaves what it has. Exits with 1 when a part failed. Without a CUDA GPU it prints floors and targets,
says that nothing was measured, and exits with 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu.kernel_report import render
from gpu.moe_peers import others_installed
from gpu.moe_shapes import CASES, QWEN3, LayerCase
from harness import Worker, WorkerError, as_module, result_file, say, write_result
from machine import conditions

SECONDS = 280  # after which no part is begun

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What one call of the worker measures."""

    section: str
    name: str
    method: str
    arguments: dict[str, Any] = field(default_factory=dict)


def layer_part(case: LayerCase, section: str = "layers", method: str = "layer") -> Part:
    """A routed layer."""
    arguments = {"model": case.shape.name, "format": case.format, "tokens": case.tokens}
    return Part(section, case.name, method, arguments)


def all_parts() -> list[Part]:
    """In an order that builds each model's experts once, what matters most first."""
    by_model: dict[tuple[str, str], list[LayerCase]] = {}
    for case in CASES:
        by_model.setdefault((case.shape.name, case.format), []).append(case)
    parts = []
    for cases in by_model.values():
        parts += [layer_part(case) for case in cases]
        if (cases[0].shape, cases[0].format) == (QWEN3, "bf16"):
            parts += [layer_part(case, "indirection", "indirection") for case in cases if case.tokens != 4]
    parts += [Part("small ops", "small ops", "small_ops"), Part("attention", "attention", "attention")]
    misses = [Part("miss", f"{QWEN3.name} {f}", "miss", {"model": QWEN3.name, "format": f}) for f in ("bf16", "int4")]
    return [*parts, *misses]


def new_worker() -> Worker:
    """A process with a CUDA context of its own."""
    threads = str(min(8, len(os.sched_getaffinity(0))))
    return Worker("the kernels", as_module("gpu.kernel_worker"), {"OMP_NUM_THREADS": threads})


class Bench:
    """One run: the worker, the result so far, and the file that holds it."""

    def __init__(self, result: Result, out: Path | None, deadline: float) -> None:
        self.result, self.out, self.deadline = result, out, deadline
        self._worker = new_worker()

    def run(self, parts: list[Part]) -> None:
        """Facts and ceilings first; a part that fails is noted, and the next runs in a fresh process."""
        quick, started = self.result["quick"], time.perf_counter()
        facts = self._call("facts", {})
        self.result |= facts or {}
        self.result["ceilings"] = facts and self._call("ceilings", {"quick": quick})
        for part in parts if facts else []:  # a worker that cannot even say where it is will measure nothing
            self._measure(part, {**part.arguments, "quick": quick})
            self.result["seconds"] = time.perf_counter() - started
            self.save()
        self._worker.close()

    def save(self) -> None:
        """The result so far."""
        if self.out:
            write_result(self.out, self.result)

    def _measure(self, part: Part, arguments: dict[str, Any]) -> None:
        entry = {"section": part.section, "name": part.name, "status": "measured", "error": None}
        entry |= {"rows": [], "checks": [], "errors": []}
        self.result["parts"].append(entry)
        if time.perf_counter() > self.deadline:
            entry |= {"status": "skipped", "error": "the time was up"}
            return
        say(f"{part.section}: {part.name}")
        began = time.perf_counter()
        try:
            entry |= self._worker.call(part.method, **arguments)
        except WorkerError as error:
            say(str(error))
            entry |= {"status": "failed", "error": str(error)}
        if entry["error"] or entry["errors"]:
            self._renew_worker()
        entry["seconds"] = time.perf_counter() - began

    def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        """What comes before the parts; None where it failed, which is noted as a part."""
        try:
            return self._worker.call(method, **arguments)
        except WorkerError as error:
            say(str(error))
            failed = {"section": "machine", "name": method, "status": "failed", "error": str(error)}
            self.result["parts"].append(failed | {"rows": [], "checks": [], "errors": []})
            self._renew_worker()
            return None

    def _renew_worker(self) -> None:
        """An error of a kernel may have left the old one's context unusable."""
        self._worker.close()
        self._worker = new_worker()


def new_result(quick: bool) -> Result:
    """A result without figures."""
    return conditions("bench_kernels", quick) | {"ceilings": None, "others": others_installed(), "parts": []}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny experts: a check of the bench, no figures")
    parser.add_argument("--json", type=result_file, help="write all figures to this file, after every part")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no part later (default %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measures, prints the report, writes the result file; 1 when a part failed."""
    args = arguments()
    result = new_result(args.quick)
    bench_parts = all_parts()
    if torch.cuda.is_available():
        bench = Bench(result, args.json, time.perf_counter() + args.seconds)
        bench.run(bench_parts)
        bench.save()
    else:
        blank = {"status": "not measured", "error": None, "rows": [], "checks": [], "errors": []}
        result["parts"] = [{"section": p.section, "name": p.name} | blank for p in bench_parts]
        if args.json:
            write_result(args.json, result)
    print(render(result))
    return int(any(part["status"] == "failed" or part["errors"] for part in result["parts"]))


if __name__ == "__main__":
    sys.exit(main())
