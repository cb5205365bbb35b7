"""How long a newcomer waits: ``python bench/bench_newcomer.py [--json OUT [--readme README.md]] [--quick]``.

README's run line in a temporary folder, command by command: a fresh environment, torch, this package, the first text.
Then ``duoserve evaluate`` on prompts of their own (lines of a play). What has to be downloaded is downloaded before, in
a step of its own, and the installation reads it from there (``--no-index --find-links``). One run, not a median:
newcomers come once. ``--quick`` makes no environment and takes few prompts: it checks the bench. Exits with 1 when a
command fails, or when a path takes longer than its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import newcomer_report
from harness import result_file, say, write_result
from machine import REPOSITORY, conditions, foreign_cpu
from newcomer_report import DOWNLOAD, EVALUATE, FIRST_TEXT, SET_UP
from tables import into_readme

PLAY = REPOSITORY / "tests" / "macbeth.txt"
BUILD = ("hatchling", "editables")  # what pip fetches to build the package itself
CHUNK = 1 << 16
VERSIONS = "import json, sys; sys.path.append(sys.argv[1]); import machine; print(json.dumps(machine.versions()))"


@dataclass(frozen=True)
class SetUp:
    """README's run line, taken apart."""

    requirements: tuple[str, ...]  # as torch==2.13.0
    generate: tuple[str, ...]  # the command that writes the first text


def set_up(readme: str) -> SetUp:
    """From the line below the marker; SystemExit where it is not as this bench knows it."""
    found = re.search(r"<!-- run line -->\n```sh\n(.*)\n```", readme)
    match [shlex.split(command) for command in found[1].split(" && ")] if found else []:
        case [
            ["python3", "-m", "venv", _],
            [".", _],
            ["pip", "install", *packages],
            ["pip", "install", "-e", "."],
            run,
        ]:
            return SetUp(tuple(packages), tuple(run))
    raise SystemExit("README's run line is not: venv, activate, pip install ..., pip install -e ., duoserve ...")


def own_prompts(play: str, count: int) -> list[str]:
    """Speeches' first lines, evenly over the play."""
    lines = [line for line in play.splitlines() if len(line.split()) > 4 and not line.startswith(("[", "ACT", "SCENE"))]
    return lines[:: max(1, len(lines) // count)][:count]


class Newcomer:
    """Runs commands in ``folder`` and notes how long each took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        own = {"DUOSERVE_CACHE": str(folder / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own

    def enter(self, programs: Path) -> None:
        """Activates an environment: its programs before all others."""
        self.env["PATH"] = os.pathsep.join([str(programs), self.env["PATH"]])

    def run(self, kind: str, *command: str) -> str:
        """What the command wrote; SystemExit with its name and status where it fails."""
        say(shlex.join(command))
        began = time.perf_counter()
        # Resolved here: Popen would search the PATH of this process, not that of ``env``.
        words = ["env", *command]
        done = subprocess.run(words, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True, check=False)
        self._note(kind, command, time.perf_counter() - began, done.returncode)
        return done.stdout

    def first_text(self, *command: str) -> float:
        """Seconds until the first output, of a command that streams."""
        say(shlex.join(command))
        began = time.perf_counter()
        with subprocess.Popen(["env", *command], cwd=self.folder, env=self.env, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            first = time.perf_counter() - began
            while process.stdout.read(CHUNK):
                pass
        self._note(FIRST_TEXT, command, time.perf_counter() - began, process.returncode)
        return first

    def _note(self, kind: str, command: tuple[str, ...], seconds: float, status: int) -> None:
        if status:
            raise SystemExit(f"{shlex.join(command)} ended with status {status}")
        shown = shlex.join(command)
        for path, name in ((self.folder, "."), (REPOSITORY, "CHECKOUT"), (sys.executable, "python3")):
            shown = shown.replace(str(path), name)
        self.steps.append({"kind": kind, "command": shown, "seconds": seconds})


def installed(newcomer: Newcomer, asked: SetUp) -> int:
    """Downloads, then makes the environment and installs into it; the bytes that were downloaded."""
    wheels, environment = newcomer.folder / "wheels", newcomer.folder / ".venv"
    local = ["--no-index", "--find-links", str(wheels)]
    newcomer.run(SET_UP, sys.executable, "-m", "venv", str(environment))
    newcomer.enter(environment / "bin")
    newcomer.run(DOWNLOAD, "pip", "download", "-q", "-d", str(wheels), *asked.requirements, *BUILD, str(REPOSITORY))
    newcomer.run(SET_UP, "pip", "install", "-q", *local, *asked.requirements)
    newcomer.run(SET_UP, "pip", "install", "-q", *local, "-e", str(REPOSITORY))
    return sum(file.stat().st_size for file in wheels.iterdir())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    result, began, busy = conditions("bench_newcomer", args.quick), time.perf_counter(), foreign_cpu(1.0)
    asked = set_up((REPOSITORY / "README.md").read_text())
    prompts, tokens = own_prompts(PLAY.read_text(), 3 if args.quick else args.prompts), 8 if args.quick else 64
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        newcomer = Newcomer(Path(folder))
        if args.quick:
            newcomer.env["PYTHONPATH"] = str(REPOSITORY)
            newcomer.enter(Path(sys.executable).parent)
            newcomer.steps.append({"kind": SET_UP, "command": "the run line", "seconds": None})
        result["download_bytes"] = 0 if args.quick else installed(newcomer, asked)
        result["first_output_s"] = newcomer.first_text(*asked.generate)
        (newcomer.folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
        command = ["duoserve", "evaluate", "bard", "--prompts", "prompts.txt", "--max-tokens", str(tokens), "--json"]
        result["chosen"] = json.loads(newcomer.run(EVALUATE, *command))["policy"]
        # Asked in the new environment, and no step of a newcomer's.
        command = ["env", "python", "-c", VERSIONS, str(REPOSITORY / "bench")]
        result["versions"] = json.loads(subprocess.check_output(command, env=newcomer.env, cwd=folder))
    result |= {"steps": newcomer.steps, "prompts": len(prompts), "max_tokens": tokens}
    result |= {"seconds": time.perf_counter() - began, "idle": {"before": busy, "after": foreign_cpu(1.0)}}
    return result | {"verdicts": newcomer_report.verdicts(newcomer.steps)}


def main() -> int:
    """1 when a path took longer than its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file, help="write everything to this file, the report beside it")
    parser.add_argument("--readme", type=Path, help="with --json: put its sentence between this file's markers")
    parser.add_argument("--prompts", type=int, default=24, help="that evaluate gets (default 24)")
    parser.add_argument("--quick", action="store_true", help="no environment, few prompts: a check of the bench")
    args = parser.parse_args()
    if args.readme and (args.quick or not args.json):
        parser.error("--readme needs --json, and a run that is not --quick")
    result = measure(args)
    report = newcomer_report.render(result)
    print(report)
    if args.json:
        details = args.json.with_suffix(".md")
        write_result(args.json, result)
        details.write_text(f"{report}\n")
    if args.readme:
        text = newcomer_report.sentence(result, str(details))
        args.readme.write_text(into_readme(args.readme.read_text(), text, newcomer_report.MARKERS))
    return int(any(found["verdict"] == "missed" for found in result["verdicts"]))


if __name__ == "__main__":
    sys.exit(main())
