"""``duoserve bench cpu`` and ``bench gpu``: make the README's measurements anew, with the benches of a clone."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

import torch

from duoserve.cli.options import Subparsers, add_parser, refuse_unused
from duoserve.errors import ConfigError, DuoServeError
from duoserve.files.whole import scratch_folder

CPU_EXAMPLES = """\
  git clone REPOSITORY && cd duoserve && duoserve bench cpu
  duoserve bench cpu --checkout ~/duoserve --quick --out /tmp/results
"""
GPU_EXAMPLES = """\
  duoserve bench gpu --checkout ~/duoserve
"""
# So short that no figures come of it, but every part begins. Results of a real run are not overwritten.
QUICK_SUITE = {"BENCH_SECONDS": "40", "SERVE_SECONDS": "60", "RESULT_SUFFIX": "-quick"}


class Job(NamedTuple):
    """One script of bench/, its arguments and its environment; what it prints is also written to ``report``."""

    script: str
    words: tuple[str, ...]
    report: Path | None = None
    env: Mapping[str, str] = {}


class Jobs(Protocol):
    """Makes the list of a report's jobs, in order."""

    def __call__(self, checkout: Path, out: Path, args: argparse.Namespace) -> list[Job]: ...


def add_reports(benches: Subparsers) -> None:
    """Registers both commands."""
    cpu = add_parser(benches, "cpu", "measure this machine's CPU, and make the README's tables and plot", CPU_EXAMPLES)
    cpu.add_argument(
        "--texts",
        type=Path,
        metavar="DIR",
        help="folder of Shakespeare's works, on which formats, predictors and routing are then measured too",
    )
    cpu.set_defaults(command=partial(run, jobs=cpu_jobs))
    gpu = add_parser(benches, "gpu", "measure the link, the kernels and whole models on this GPU", GPU_EXAMPLES)
    gpu.set_defaults(command=partial(run, jobs=gpu_jobs))
    for parser in (cpu, gpu):
        parser.add_argument("--checkout", type=Path, default=Path(), metavar="DIR", help="a clone (default: here)")
        parser.add_argument(
            "--out", type=Path, metavar="DIR", help="folder for results (default: bench/results of the clone)"
        )
        parser.add_argument("--quick", action="store_true", help="try it out: no figures, the README stays as it is")
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object with what was written, at the end"
        )


def run(args: argparse.Namespace, jobs: Jobs) -> None:
    """Runs one script after the other; raises ConfigError if they are missing, DuoServeError once one fails."""
    checkout = args.checkout.expanduser().resolve()
    if not (checkout / "bench").is_dir():
        raise ConfigError(
            f"{checkout} has no bench/, which the package does not bring along: clone the repository that it was built "
            "from, and give that folder as --checkout"
        )
    out = (args.out or checkout / "bench" / "results").expanduser().resolve()
    planned = jobs(checkout, out, args)
    _make(out)
    before = _ages(out)
    for job in planned:
        _carry_out(job, checkout, sys.stderr if args.json else sys.stdout)
    after = _ages(out)
    written = sorted(str(file) for file, age in after.items() if before.get(file) != age)
    print(json.dumps({"written": written}) if args.json else "\n".join(["written:", *written]))


def _make(out: Path) -> None:
    """Makes the folder for results and tries to write there, as benches take long; raises ConfigError if it cannot."""
    with _writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with scratch_folder(out, ".trying-"):
            pass


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error})") from error


def cpu_jobs(checkout: Path, out: Path, args: argparse.Namespace) -> list[Job]:
    """The CPU bench, its report, the planner and the policies; with texts also the benches on texts.

    Raises ConfigError without the packages that the bench makes its models with.
    """
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"bench cpu needs {' and '.join(missing)}: in the clone, pip install -e '.[test]'")
    if args.quick:
        refuse_unused(args, ["texts"], "a --quick run makes no table of texts")
    day = time.strftime("%Y-%m-%d", time.gmtime())
    name = f"{_slug(_cpu_name())}-{day}"
    # Results name their command, which should not depend on where the clone is: all scripts start in it.
    out = out.relative_to(checkout) if out.is_relative_to(checkout) else out
    if args.quick:
        return _cpu_bench(out / f"cpu-{name}-quick.json", ("--quick",), ())
    result, here, newcomer = (out / f"{kind}-{name}.json" for kind in ("cpu", "plan-here", "newcomer"))
    readme = ("--readme", "README.md")
    return [
        *_cpu_bench(result, (), readme),
        Job("bench_plan.py", ("--cpu", str(result), "--out", str(out / f"plan-{day}.md"))),
        Job("bench_policies.py", ("--json", str(out / f"policies-{day}.json"))),
        Job("plan_here.py", ("--json", str(here)), here.with_suffix(".md")),
        *_jobs_on_texts(out, args.texts, readme),
        Job("bench_newcomer.py", ("--json", str(newcomer), *readme)),
    ]


def _cpu_bench(result: Path, quick: tuple[str, ...], readme: tuple[str, ...]) -> list[Job]:
    """The bench, which writes ``result``, and the jobs that make reports of it."""
    return [
        Job("bench_cpu.py", (*quick, "--json", str(result))),
        Job("cpu/report.py", (str(result), *readme), result.with_suffix(".md")),
        Job("opening.py", (str(result), *readme)),
    ]


def _jobs_on_texts(out: Path, texts: Path | None, readme: tuple[str, ...]) -> list[Job]:
    if texts is None:
        return []
    told = ("--texts", str(texts.expanduser().resolve()))
    models = ("bard", "bard-fine")
    predictors = [
        Job("bench_predictors.py", ("--model", model, *told, "--json", str(out / f"predictors-{model}.json")))
        for model in models
    ]
    return [
        Job("bench_quantize.py", (*told, "--json", str(out / "quantize-bard.json"), *readme)),
        *predictors,
        Job("bench_routing.py", (*told, "--json", str(out / "routing-embedded.json"))),
    ]


def gpu_jobs(checkout: Path, out: Path, args: argparse.Namespace) -> list[Job]:
    """The suite for GPU machines, without tests; it names its results itself. Raises ConfigError without a GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu needs a CUDA device, and torch sees none; duoserve bench cpu needs none")
    env = {"OUT": str(out), "PYTHON": sys.executable} | (QUICK_SUITE if args.quick else {})
    return [Job("gpu_suite.sh", ("copy", "kernels", "serve"), env=env)]


def _carry_out(job: Job, checkout: Path, terminal: TextIO) -> None:
    """Runs a script and streams what it prints. It imports the package of the checkout, whose commit it names."""
    starter = ["bash"] if job.script.endswith(".sh") else [sys.executable]
    command = [*starter, f"bench/{job.script}", *job.words]
    print(f"== {shlex.join(command)}", file=sys.stderr, flush=True)
    path = os.pathsep.join([str(checkout), str(checkout / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, **job.env, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    lines = []
    with subprocess.Popen(command, cwd=checkout, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=terminal, flush=True)
            lines.append(line)
    if process.returncode:
        raise DuoServeError(f"bench/{job.script} ended with status {process.returncode}; nothing was run after it")
    if job.report:
        report = checkout / job.report
        with _writing_to(report.parent):
            report.write_text("".join(lines))


def _ages(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()}


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
