"""Models of real size served with their experts in host memory: every policy, slot budget, prompt and batch in one run.

    python bench/bench_serve.py [--json OUT] [--models NAME ...] [--seconds 480] [--arena-gib 32] [--tiny]

Weights are random and routing is replayed (see results/README.md), so no checkpoint is needed. Figures: TTFT, TPOT,
tokens a second, hits, the link's use, stalls, peak memory, energy, each beside its bound; then one part of the runtime
switched off at a time, and transformers with accelerate's offloading. The result file is written after every cell, so a
run that is cut short leaves what it has. ``--tiny`` runs all of it with small models on a CPU: it checks the bench and
measures nothing. Exits with 1 when a cell or a check failed, with 3 where there is no CUDA GPU and no ``--tiny``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from harness import Worker, WorkerError, as_module, result_file, say, write_result
from machine import conditions
from serve.cells import AUTO, BASE, EVENT, GRAPH, PROMPTS, Cell, cells, promised, shown
from serve.figures import checks, figures, targets
from serve.models import MODELS
from serve.report import render
from serve.worker import ARENA_GIB, IS_TINY

PEER_STEPS = 4
TIMELINE_SECONDS = 20  # kept for the timeline, which comes last; no more than a tenth of all

Result = dict[str, Any]
Part = dict[str, Any]


def all_parts(models: list[str]) -> list[Part]:
    """What most promises are about, of two models, for a run may be cut short; then every other cell, by stages."""
    first, *others = cells(models)
    parts = []
    for model in models[:2]:
        compared, cells_of = promised(model)
        parts += [_part(compared), _peer(model), *map(_part, cells_of)]
    parts += [*map(_part, first), *map(_peer, models[2:]), *(_part(cell) for stage in others for cell in stage)]
    return list({part["name"]: part for part in parts}.values())


def _peer(model: str) -> Part:
    return {"name": f"{model}, transformers + accelerate", "model": model}


def _part(cell: Cell) -> Part:
    return {"name": cell.name, "model": cell.model, "cell": cell.to_dict()}


class Bench:
    """One run: the worker, the result so far, and the file that holds it."""

    def __init__(self, result: Result, out: Path | None, seconds: float, env: dict[str, str]) -> None:
        self.result, self.out = result, out
        self._began = time.perf_counter()
        self._deadline = self._began + seconds
        self._last_cell = self._deadline - min(TIMELINE_SECONDS, seconds / 10)
        threads = os.environ.get("OMP_NUM_THREADS") or str(min(8, len(os.sched_getaffinity(0))))
        self._env = env | {"OMP_NUM_THREADS": threads}
        self._worker = self._new_worker()

    def run(self, parts: list[Part], shown: list[Cell]) -> None:
        """Facts and ceilings first; a part that fails is noted, and the next runs in a fresh process.

        The timeline of ``shown`` comes last: the profiler may stay in the process of what is measured.
        """
        facts = self._worker.call("facts")  # a machine where this fails measures nothing, and its traceback says why
        self.result |= {"gpu": facts.pop("gpu"), "arena": facts, "ceilings": self._worker.call("ceilings")}
        for part in parts:
            self.result["parts"].append(part | self._outcome(part))
            self.finish()
        self.result["timeline"] = self._timeline(shown)
        self.finish()
        self._worker.close()

    def finish(self) -> None:
        """Checks and verdicts of what there is, and the file."""
        done, rates = self.result["parts"], self.result["ceilings"]
        self.result["seconds"] = time.perf_counter() - self._began
        self.result["checks"] = checks(done)
        judged = [] if self.result["quick"] else [target.to_dict() for target in targets(done, rates)]
        self.result["targets"] = judged
        if self.out:
            write_result(self.out, self.result)

    def _outcome(self, part: Part) -> Part:
        method, arguments = "peer", {"model": part["model"], "prompt": PROMPTS[0], "steps": PEER_STEPS}
        if "cell" in part:
            method, arguments = "cell", part["cell"]
        found = self._asked(part["name"], self._last_cell, method, arguments)
        if "why" in found:
            return found
        row = {"row": figures(found, self.result["ceilings"])} if "cell" in part else {}
        return {"status": "measured", "measured": found} | row

    def _timeline(self, cells: list[Cell]) -> Part:
        names = ", ".join(cell.name for cell in cells)
        arguments = {"cells": [cell.to_dict() for cell in cells]}
        found = self._asked(f"a timeline: {names}", self._deadline, "timeline", arguments)
        return {"name": names} | (found if "why" in found else {"status": "measured"} | found)

    def _asked(self, what: str, until: float, method: str, arguments: Part) -> Part:
        """What the worker answers; a status and why, where there is no time or it cannot."""
        if time.perf_counter() > until:
            return {"status": "skipped", "why": "the time was up"}
        say(what)
        try:
            found: Part = self._worker.call(method, **arguments)
        except WorkerError as error:
            say(str(error))
            self._worker.close()
            self._worker = self._new_worker()
            return {"status": "failed", "why": str(error)}
        return {"status": "not measured", "why": found["unavailable"]} if "unavailable" in found else found

    def _new_worker(self) -> Worker:
        return Worker("the models", as_module("serve.worker"), self._env)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file, help="write all figures to this file, after every cell")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=480, help="begin no cell later (default %(default)s)")
    parser.add_argument("--arena-gib", type=float, default=32, help="host memory of the experts (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU: a check of the bench, no figures")
    return parser.parse_args()


def main() -> int:
    """Measures, prints the report, writes the result file."""
    args = arguments()
    if not args.tiny and not torch.cuda.is_available():
        print("bench_serve: no CUDA GPU: nothing was measured")
        return 3
    result = conditions("bench_serve", args.tiny)
    result |= {"arena": None, "ceilings": None, "base_policy": BASE, "parts": [], "checks": [], "targets": []}
    result["timeline"] = None
    env = {IS_TINY: str(int(args.tiny)), ARENA_GIB: str(args.arena_gib)}
    bench = Bench(result, args.json, args.seconds, env)
    modes = [AUTO] if args.tiny else [EVENT, GRAPH]  # a CPU has none but the engine's own choice
    bench.run(all_parts(args.models), shown(args.models[0], modes))
    print(render(result))
    failed = any(part["status"] == "failed" for part in (*result["parts"], result["timeline"]))
    return int(failed or any(check["passed"] is False for check in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
