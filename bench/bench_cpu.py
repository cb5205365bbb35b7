"""duoserve on a CPU against transformers (all weights in RAM) and accelerate (experts on disk), in one run.

    python bench/bench_cpu.py [--folder DIR] [--quick] [--json OUT]

Builds a random bf16 Mixtral once (288 M parameters; ``--quick``: a tiny one), then measures, each engine in a process
of its own, round by round in turn: resident speed; speed from a cold disk with a quarter of the experts in slots; every
policy; the memory that a fresh process grows by. The machine's ceilings are measured in the same run, and the outputs
are compared. Exits with 1 when a correctness check fails; a target that is not reached is printed, not an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cpu_summary
from harness import WORKER_ENV, Round, Worker, interleave
from machine import foreign_cpu, machine_facts, versions
from report import render
from shapes import SHAPES, Shape

BENCH = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "duoserve" / "bench"
FULL_SCRATCH, QUICK_SCRATCH = 512 << 20, 32 << 20  # bytes that the memory probes read: far more than the caches hold
SCRIPTS = {
    "duoserve": ("ours.py",),
    "transformers": ("peers.py", "transformers"),
    "accelerate": ("peers.py", "accelerate"),
}


@dataclass(frozen=True)
class Contestant:
    """One engine as it is set up; ``cold``: the page cache of its files is dropped before every token."""

    name: str
    kind: str
    options: dict[str, Any]
    cold: bool = False


@dataclass
class Run:
    """What one run measures and where its files are; ``scratch`` lies on the checkpoint's disk.

    ``token_ids`` are what the first engine to answer chose, and ``routing`` [L][T][K] how these tokens route.
    """

    shape: Shape
    folder: Path
    scratch: Path
    threads: int
    rounds: int
    engines: tuple[str, ...]
    prompt: list[int]
    token_ids: list[int] | None = None
    routing: list[list[list[int]]] | None = None

    @property
    def packs(self) -> Path:
        """Where duoserve keeps its packed experts."""
        return self.folder.with_name(self.folder.name + "-packs")

    def worker(self, name: str, *command: str) -> Worker:
        """A new process that runs a script of this folder."""
        script, *words = command
        return Worker(name, [str(BENCH / script), *words], {"OMP_NUM_THREADS": str(self.threads)})

    def duoserve_options(self, policy: str, slots: int) -> dict[str, Any]:
        """What ``Duoserve.load`` takes."""
        return {"policy": policy, "slots": slots, "max_context": self.shape.max_context, "cache": str(self.packs)}


def resident_contestants(run: Run) -> list[Contestant]:
    """All weights in RAM; float32 takes twice the memory, is the reference for the logits, and no rival of bf16."""
    ours = run.duoserve_options("resident", run.shape.num_experts)
    return [
        Contestant(cpu_summary.OURS, "duoserve", ours),
        *(
            Contestant(f"transformers {way}", "transformers", {"implementation": way})
            for way in ("grouped_mm", "eager")
        ),
        Contestant(cpu_summary.REFERENCE, "transformers", {"implementation": "grouped_mm", "dtype": "float32"}),
    ]


def disk_contestants(run: Run) -> list[Contestant]:
    """Experts on disk: ours with a quarter in slots, theirs with none in RAM and with a quarter (by layers)."""

    def ours(policy: str) -> Contestant:
        return Contestant(f"duoserve {policy}", "duoserve", run.duoserve_options(policy, run.shape.quarter), cold=True)

    def accelerate(name: str, resident_layers: int, cold: bool) -> Contestant:
        offload = str(run.scratch / name.replace(" ", "-"))  # one each: dropping its cache must not cool another's
        options = {"implementation": "grouped_mm", "offload": offload, "resident_layers": resident_layers}
        return Contestant(name, "accelerate", options, cold)

    return [
        ours("lru"),
        accelerate(cpu_summary.PEER_DISK, 0, cold=True),
        accelerate(cpu_summary.PEER_DISK_EQUAL, run.shape.layers // 4, cold=True),
        accelerate(cpu_summary.PEER_DISK_WARM, 0, cold=False),
        ours("on-demand"),
        ours("layer-prefetch"),
    ]


def measure_rounds(run: Run, contestants: Sequence[Contestant]) -> dict[str, list[Round]]:
    """The rounds of every contestant whose engine takes part, in turn, after a warm-up round that is discarded.

    All take turns in one circle, so that a minute in which the machine is slow falls on all alike.

    Each leaves its logits of the whole sequence in ``run.scratch``.
    """
    playing = {c.name: c for c in contestants if c.kind in run.engines}
    with ExitStack() as opened:
        workers: dict[str, Worker] = {}

        def one_round(name: str) -> Round:
            request = {"prompt": run.prompt, "forced": run.token_ids, "new_tokens": run.shape.new_tokens}
            played: Round = workers[name].call("round", **request, cold=playing[name].cold)
            return played

        for name, contestant in playing.items():
            say(f"loading {name}")
            workers[name] = opened.enter_context(run.worker(name, *SCRIPTS[contestant.kind]))
            workers[name].call("load", folder=str(run.folder), **contestant.options)
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
        worker.call("logits", token_ids=sequence, out=str(cpu_summary.logits_file(run.scratch, name)))
    if cpu_summary.REFERENCE in workers:
        routing = workers[cpu_summary.REFERENCE].call("routing", token_ids=sequence)
        run.routing = [layer[len(run.prompt) :] for layer in routing]


def measure_ceilings(run: Run, scratch_bytes: int) -> dict[str, Any]:
    """The machine's rates; the disk's from the pack where there is one, else from the checkpoint."""
    files = [*run.packs.rglob("experts.pack"), *run.folder.glob("*.safetensors")]
    shape = run.shape
    with run.worker("the ceilings", "ceilings.py") as worker:
        rates: dict[str, Any] = worker.call(
            "measure",
            file=str(files[0]),
            piece_bytes=shape.slot_bytes,
            rows=shape.prompt_tokens,
            shape_NK=(2 * shape.intermediate, shape.hidden),
            scratch_bytes=scratch_bytes,
        )
    return rates


def measure_footprint(run: Run) -> dict[str, int]:
    """Growth of a fresh process that loads with a quarter of the experts in slots and serves one request."""
    with run.worker("duoserve's footprint", *SCRIPTS["duoserve"]) as worker:
        growth: dict[str, int] = worker.call(
            "footprint",
            folder=str(run.folder),
            prompt=run.prompt,
            new_tokens=run.shape.new_tokens,
            **run.duoserve_options("lru", run.shape.quarter),
        )
    return growth


def measure(run: Run, scratch_bytes: int) -> dict[str, Any]:
    """All raw figures of a run."""
    busy_before = foreign_cpu(1.0)
    resident, disk = resident_contestants(run), disk_contestants(run)
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
        "idle": {"foreign_cpu_before": busy_before, "foreign_cpu_after": foreign_cpu(1.0), "load": os.getloadavg()},
    }


def conditions(run: Run, quick: bool) -> dict[str, Any]:
    """Under what the figures were measured."""
    return {
        "bench": "bench_cpu",
        "quick": quick,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine_facts(run.folder),
        "versions": versions(),
        "threads": run.threads,
        "worker_env": WORKER_ENV,
        "not_measured": [name for name in SCRIPTS if name not in run.engines],
        "shape": asdict(run.shape),
    }


def installed(engines: Sequence[str]) -> tuple[str, ...]:
    """Those of ``engines`` that this environment has; accelerate needs transformers too."""
    found = {name for name in engines if importlib.util.find_spec(name) is not None}
    return tuple(name for name in engines if name in found and (name != "accelerate" or "transformers" in found))


def say(text: str) -> None:
    """Progress goes to stderr, the report to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the checkpoint's folder, made if missing (default: in the cache)")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a check of the bench, no figures")
    parser.add_argument("--json", type=Path, help="write all rounds and the summary to this file")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of each engine (default 7)")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="threads (default 2)")
    parser.add_argument("--engines", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="what to measure")
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
        run = Run(SHAPES[size], folder, Path(scratch), args.threads, args.rounds, engines, SHAPES[size].prompt())
        result = conditions(run, args.quick)
        raw = measure(run, QUICK_SCRATCH if args.quick else FULL_SCRATCH)
        disk = result["machine"]["disk"]["filesystem"]
        result |= raw | cpu_summary.summarize(run.shape, raw, disk, run.scratch)
    result["seconds"] = time.perf_counter() - started
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(check["passed"] is False for check in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
