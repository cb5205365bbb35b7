"""What every bench shares: workers in subprocesses, interleaved rounds, progress, summaries and verdicts.

Each engine lives in a worker of its own, so that no engine's memory, threads or files disturb another. Only one
worker works at a time. OpenMP keeps its defaults, as users have them: its threads spin for some milliseconds after an
operation and then sleep, so an idle worker takes no time from another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent
WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

Round = dict[str, Any]


def as_module(module: str, *words: str) -> list[str]:
    """What Python is told to start a module of this folder, in ``module_env``; -P: the working folder has no say."""
    return ["-P", "-m", module, *words]


def module_env(own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment at hand, in which Python also finds what is in this folder, and ``own`` on top."""
    path = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **(own or {})}


class WorkerError(Exception):
    """A worker died or raised; the message carries its traceback."""


class Worker:
    """A subprocess that holds one object and calls its methods: a line of JSON in, a line of JSON out."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=module_env(WORKER_ENV | env),
        )

    def call(self, method: str, **arguments: Any) -> Any:
        """The method's result; WorkerError where it raised or the worker died."""
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps({"method": method, "arguments": arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the worker of {self.name} died with exit status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"the worker of {self.name} failed in {method}:\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the worker's input, and so the worker."""
        if self._process.stdin:
            with suppress(BrokenPipeError):  # of a line that a dead worker never took
                self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(make: Callable[[], Any]) -> None:
    """The worker's side: makes its object, answers calls of its methods until the input ends, and closes it.

    torch gets as many threads as OMP_NUM_THREADS says. What libraries print goes to stderr, stdout is for answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    subject = make()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(subject, request["method"])(**request["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    subject.close()


@dataclass
class Figures:
    """One round: a request that is prefilled in one pass, then decoded a token at a time.

    Seconds; ``itl_s`` are the gaps between tokens; ``*_read`` are bytes that came from the disk; ``foreign_cpu`` is the
    share of the machine's CPU time that others used.
    ``stats`` are the engine's own figures of the request, ``prefill_stats`` the same when its first token came.
    """

    ttft_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    prefill_read: int = 0
    decode_read: int = 0
    token_ids: list[int] = field(default_factory=list)
    foreign_cpu: float = 0.0
    prefill_stats: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    def add(self, seconds: float, read: int, token: int) -> None:
        """The next token, and what it cost."""
        if self.token_ids:
            self.itl_s.append(seconds)
            self.decode_read += read
        else:
            self.ttft_s, self.prefill_read = seconds, read
        self.token_ids.append(token)


def result_file(name: str) -> Path:
    """For ``--json``: a file that can be written, its folder made; else argparse says so, before hours are measured."""
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()  # a run that is cut off leaves no empty result
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be written: {error.strerror}") from None
    return path


def write_result(path: Path, result: Any) -> None:
    """All of ``result`` as JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def say(text: str) -> None:
    """Progress goes to stderr, the report to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def interleave(names: Sequence[str], rounds: int, run: Callable[[str], Round]) -> dict[str, list[Round]]:
    """A B A B: round by round, every name once, so that equal indices of two names are a pair."""
    done: dict[str, list[Round]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            done[name].append(run(name))
    return done


@dataclass(frozen=True)
class Summary:
    """Median and extremes over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_pairs(cls, ours: Sequence[float], theirs: Sequence[float]) -> Summary:
        """Of the ratios ours / theirs, round by round."""
        return cls.of([a / b for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Target:
    """One promise of the project: ``value`` against ``limit``; ``value`` None where it was not measured."""

    name: str
    value: float | None
    limit: float
    at_least: bool
    unit: str
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        """None where it was not measured, which is never a pass."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def verdict(self) -> str:
        """``reached: 1.2x``, ``NOT reached: 0.8x`` or ``not measured``."""
        if self.value is None:
            return "not measured"
        return f"{'reached' if self.reached else 'NOT reached'}: {self.value:.4g}{self.unit}"

    def asked(self) -> str:
        """The limit in words."""
        return f"{'>=' if self.at_least else '<='} {self.limit:.4g}{self.unit}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, verdict included, for the result file."""
        return asdict(self) | {"reached": self.reached, "asked": self.asked(), "verdict": self.verdict()}
