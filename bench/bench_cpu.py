"""duoserve on a CPU against transformers, llama.cpp (in RAM and from disk) and accelerate (from disk), in one run.

    python bench/bench_cpu.py [--folder DIR] [--quick] [--json OUT]

Builds a random bf16 Mixtral once (288 M parameters; ``--quick``: a tiny one, and fewer engines), then measures, each
engine in a process of its own, round by round in turn: resident speed; speed from a cold disk with a quarter of the
experts in slots; every policy; the memory that a fresh process grows by. llama.cpp takes part where xllamacpp is
installed, and from disk where a control group can limit its memory as ours. The machine's ceilings are measured in the
same run, and the outputs are compared. Exits with 1 when a correctness check fails; a target that is not reached is
printed, not an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpu import rows as cpu_rows
from cpu import summary as cpu_summary
from cpu.contestants import (
    COPY_THREADS,
    MODULES,
    Contestant,
    Run,
    disk_contestants,
    our_policies,
    resident_contestants,
)
from cpu.least_bytes import Routing, least_misses
from cpu.memory_cap import can_cap, memory_cap
from cpu.report import render
from harness import BENCH, WORKER_ENV, Round, Worker, interleave, result_file, say, write_result
from machine import conditions, foreign_cpu
from shapes import SHAPES

REHEARSAL_TOKENS = 2  # of a request before each measured one, discarded: see measure_rounds
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "duoserve" / "bench"
FULL_SCRATCH, QUICK_SCRATCH = 512 << 20, 32 << 20  # bytes that the memory probes read: far more than the caches hold


def measure_rounds(run: Run, contestants: Sequence[Contestant]) -> dict[str, list[Round]]:
    """The rounds of every contestant whose engine takes part, in turn, after a warm-up round that is discarded.

    All take turns in one circle, so that a minute in which the machine is slow falls on all alike. Each is awake when
    it is measured: under a hypervisor, memory that nobody has touched for a second is slow to come back.

    Each leaves its logits of the whole sequence in ``run.scratch``.
    """
    playing = {c.name: c for c in contestants if run.has(c)}
    with ExitStack() as opened:
        workers: dict[str, Worker] = {}

        def one_round(name: str) -> Round:
            request = {"prompt": run.prompt, "forced": run.token_ids, "cold": playing[name].cold}
            workers[name].call("round", **request, new_tokens=REHEARSAL_TOKENS)
            played: Round = workers[name].call("round", **request, new_tokens=run.shape.new_tokens)
            return played

        for name, contestant in playing.items():
            say(f"loading {name}")
            cap = {"cap": str(opened.enter_context(memory_cap(name, run.cap_bytes)))} if run.caps(contestant) else {}
            workers[name] = opened.enter_context(run.worker(name, *MODULES[contestant.kind]))
            workers[name].call("load", folder=str(run.folder), **contestant.options, **cap)
            warm_up = one_round(name)
            run.token_ids = run.token_ids or warm_up["token_ids"]
        say(f"measuring {run.rounds} rounds of {', '.join(playing)}")
        rounds = interleave(list(playing), run.rounds, one_round)
        compare_outputs(run, workers)
    return rounds


def compare_outputs(run: Run, workers: dict[str, Worker]) -> None:
    """Leaves every worker's logits of the prompt and all but the last new token, and the reference's routing."""
    sequence = run.prompt + (run.token_ids or [])[:-1]
    for name, worker in workers.items():
        worker.call("logits", token_ids=sequence, out=str(cpu_rows.logits_file(run.scratch, name)))
    if cpu_rows.REFERENCE in workers:
        routing = workers[cpu_rows.REFERENCE].call("routing", token_ids=sequence)
        run.routing = [layer[len(run.prompt) :] for layer in routing]


def measure_ceilings(run: Run, scratch_bytes: int) -> dict[str, Any]:
    """The machine's rates; the disk's from the pack where there is one, else from the checkpoint."""
    packs = sorted(run.packs.rglob("experts.pack"), key=lambda pack: pack.stat().st_size)
    files = [*packs[-1:], *run.folder.glob("*.safetensors")]
    shape = run.shape
    with run.worker("the ceilings", "ceilings") as worker:
        rates: dict[str, Any] = worker.call(
            "measure",
            file=str(files[0]),
            piece_bytes=shape.slot_bytes,
            rows=shape.prompt_tokens,
            shape_NK=(2 * shape.intermediate, shape.hidden),
            scratch_bytes=scratch_bytes,
        )
    return rates


def prepare(run: Run, policies: Sequence[Contestant]) -> Routing:
    """Trains their predictor, on what other prompts than the measured one route, and has their steps compiled.

    Where memory is limited there is none for a C++ compiler: what it has made is taken from Inductor's cache. Returns
    the experts [L][T][K] that our compiled decode steps choose, from the process that has the compiler at hand.
    """
    shape = run.shape
    with run.worker("the predictor and the compiled steps", *MODULES["duoserve"]) as worker:
        worker.call(
            "train",
            folder=str(run.folder),
            prompts=shape.training_prompts(),
            new_tokens=shape.new_tokens,
            max_context=shape.max_context,
            out=str(run.predictor),
        )
        for policy in policies:
            worker.call("load", folder=str(run.folder), **policy.options)
        routing: Routing = worker.call(
            "routing",
            folder=str(run.folder),
            prompt=run.prompt,
            new_tokens=shape.new_tokens,
            decode_mode="compiled",
            **run.duoserve_options("resident", shape.num_experts),
        )
    return routing


def measure_footprint(run: Run) -> dict[str, int]:
    """Growth of a fresh process that loads with a quarter of the experts in slots and serves one request."""
    with run.worker("duoserve's footprint", *MODULES["duoserve"]) as worker:
        growth: dict[str, int] = worker.call(
            "footprint",
            folder=str(run.folder),
            prompt=run.prompt,
            new_tokens=run.shape.new_tokens,
            **run.duoserve_options("lru", run.shape.quarter),
        )
    return growth


def find_least_misses(run: Run, routing: Routing) -> dict[str, dict[str, int]]:
    """How many of the experts in ``routing`` even the best cache would have to read, by policy, with its slots."""
    slots = {policy.name: policy.options["expert_slots"] for policy in our_policies(run)}
    return {name: least_misses(routing, count, run.shape.experts) for name, count in slots.items()}


def measure(run: Run, scratch_bytes: int) -> dict[str, Any]:
    """All raw figures of a run."""
    busy_before = foreign_cpu(1.0)
    resident, disk = resident_contestants(run), disk_contestants(run)
    routing = prepare(run, our_policies(run)) if "duoserve" in run.engines else None
    rounds = measure_rounds(run, [*resident, *disk])
    return {
        "rounds": {
            "resident": {c.name: rounds[c.name] for c in resident if c.name in rounds},
            "disk": {c.name: rounds[c.name] for c in disk if c.name in rounds},
        },
        "token_ids": run.token_ids,
        "routing": run.routing,
        "ceilings": measure_ceilings(run, scratch_bytes),
        "footprint": measure_footprint(run) if "duoserve" in run.engines else None,
        "least_misses": None if routing is None else find_least_misses(run, routing),
        "idle": {"foreign_cpu_before": busy_before, "foreign_cpu_after": foreign_cpu(1.0), "load": os.getloadavg()},
    }


def settings(run: Run) -> dict[str, Any]:
    """How the engines were set up, and which were left out."""
    return {
        "threads": run.threads,
        "worker_env": WORKER_ENV,
        "cap_bytes": run.cap_bytes,
        "rehearsal_tokens": REHEARSAL_TOKENS,
        "copy_threads": COPY_THREADS,
        "not_measured": [name for name in MODULES if name not in run.engines],
        "shape": asdict(run.shape),
    }


def installed(engines: Sequence[str]) -> tuple[str, ...]:
    """Those of ``engines`` that this environment has; accelerate needs transformers too."""
    found = {name for name in engines if importlib.util.find_spec(name) is not None}
    return tuple(name for name in engines if name in found and (name != "accelerate" or "transformers" in found))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the checkpoint's folder, made if missing (default: in the cache)")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a check of the bench, no figures")
    parser.add_argument("--json", type=result_file, help="write all rounds and the summary to this file")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of each engine (default 7)")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="threads (default 2)")
    parser.add_argument("--engines", nargs="+", choices=MODULES, default=list(MODULES), help="what to measure")
    return parser.parse_args()


def main() -> int:
    """Measures, prints the report, writes the result file; 1 when a correctness check failed."""
    args = arguments()
    size = "quick" if args.quick else "full"
    folder = (args.folder or CACHE / f"mixtral-{size}").absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(BENCH / "random_mixtral.py"), size, str(folder)], check=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder.parent) as scratch:
        engines = installed(args.engines)
        shape = SHAPES[size]
        cap_bytes = shape.cap_bytes if can_cap() else None
        without = cpu_rows.QUICK_WITHOUT if args.quick else frozenset()
        run = Run(shape, folder, Path(scratch), args.threads, args.rounds, engines, shape.prompt(), cap_bytes, without)
        result = conditions("bench_cpu", args.quick, folder) | settings(run)
        raw = measure(run, QUICK_SCRATCH if args.quick else FULL_SCRATCH)
        disk = result["machine"]["disk"]["filesystem"]
        result |= raw | cpu_summary.summarize(run.shape, raw, disk, run.scratch)
    result["seconds"] = time.perf_counter() - started
    print(render(result))
    if args.json:
        write_result(args.json, result)
    return int(any(check["passed"] is False for check in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
