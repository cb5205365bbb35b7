"""What sharing a pass over the experts is worth: tokens a second by batch size, and goodput by scheduler.

    python bench/bench_batching.py [--models bard random] [--experts disk resident] [--parts decode goodput]
        [--decode-mode compiled] [--json OUT] [--quick] > OUT.md

For `bard` and a random Mixtral of 288 M parameters, batches of 1 to 16 prompts decode together, with a quarter of the
experts in slots and the others on the disk, and with all in slots; batch sizes take turns, round by round. A step's
bound is the time to read what it had to: missing experts at the disk's rate, and every expert that it used and the
dense weights once at the memory's. Steps are compiled, the fastest way, unless ``--decode-mode`` says otherwise. With
``invariant=True``, which cannot be compiled, on one thread, the largest batch must give the tokens of each prompt
alone; how many do without it is counted. Then requests arrive at random at a service with experts on the
disk, first come first served and by slack, with the same objectives for both; goodput is the rate at which nine in ten
meet them.

Beside OUT.json comes OUT.svg, with both curves of each model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batching import plot as batching_plot
from batching import report as batching_report
from batching.goodput import Trials, goodputs
from batching.rates import decode_rounds, equal_tokens
from duoserve import MoEModel
from duoserve.launching.compiled import SIZES
from harness import result_file, write_result
from machine import ForeignCpu, conditions, foreign_cpu
from random_mixtral import ensure_checkpoint
from shapes import FULL, QUICK

REPOSITORY = Path(__file__).resolve().parent.parent
PLAY = REPOSITORY / "tests" / "macbeth.txt"
BATCHES = (1, 2, 4, 8, 12, 16)
PROMPT_TOKENS = 48
EXPERTS = ("disk", "resident")
PARTS = ("decode", "goodput")
MAX_CONTEXT = 8192  # of all sequences together: no scheduler is short of pages


@dataclass(frozen=True)
class Subject:
    """A model as it is tried: where it is, and how much there is time for."""

    name: str
    folder: str
    new_tokens: int
    rounds: int
    batches: tuple[int, ...]
    trials: Trials
    decode_mode: str

    def load(self, experts: str, cache: Path, policy: str = "duoserve", *, invariant: bool = False) -> MoEModel:
        """A quarter of the slots where experts come from the disk."""
        disk = {"expert_slots": "25%", "policy": policy}
        how: dict[str, Any] = {"policy": "resident"} if experts == "resident" else disk
        how |= {"max_context": MAX_CONTEXT, "cache_dir": cache, "invariant": invariant}
        how["decode_mode"] = "auto" if invariant else self.decode_mode
        return MoEModel.from_pretrained(self.folder, device="cpu", **how)


def subjects(args: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    """The models; the random one is made in ``folder``. It is slower, so its requests are shorter."""
    if "bard" in args.models:
        trials = Trials(seconds=args.seconds)
        yield _of(args, "bard", "bard", 48, 5, trials)
    if "random" in args.models:
        made = args.folder or folder / "mixtral"
        ensure_checkpoint(QUICK if args.quick else FULL, made)
        shorter = Trials(seconds=args.seconds, start=2.5, max_prompt=128, max_tokens=32)
        name = "random Mixtral"
        yield _of(args, name, str(made), 24, 3, shorter)


def _of(args: argparse.Namespace, name: str, folder: str, new_tokens: int, rounds: int, trials: Trials) -> Subject:  # noqa: PLR0913, PLR0917
    if args.quick:
        trials = Trials(seconds=0.0, requests=6, trials=1, max_prompt=16, max_tokens=8)
        return Subject(name, folder, 8, 1, BATCHES[:2], trials, args.decode_mode)
    return Subject(name, folder, new_tokens, rounds, BATCHES, trials, args.decode_mode)


def ids_of(model: MoEModel) -> list[int]:
    """A play for `bard`, which was trained on such; random tokens for the random model, to which all are alike."""
    if model.config.vocab_size in {FULL.vocab, QUICK.vocab}:
        random = torch.Generator().manual_seed(0)
        return torch.randint(3, model.config.vocab_size, (20_000,), generator=random).tolist()
    return model.encode(PLAY.read_text())


def passages(ids: list[int], count: int, length: int) -> list[list[int]]:
    """``count`` pieces of ``ids`` that have nothing in common."""
    stride = (len(ids) - length) // count
    return [ids[start : start + length] for start in range(0, count * stride, stride)]


def decoded(subject: Subject, experts: str, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Rates by batch size, and the tokens of a batch against those of each prompt alone."""
    with subject.load(experts, cache, args.policy) as model:
        prompts = passages(ids_of(model), max(subject.batches), PROMPT_TOKENS)
        cell: dict[str, Any] = {"model": subject.name, "experts": experts, "policy": model.policy}
        cell |= {"slots": model.memory.num_slots, "total_experts": model.memory.total_experts}
        cell |= {"prompt_tokens": PROMPT_TOKENS, "new_tokens": subject.new_tokens, "prompts": len(prompts)}
        cell |= decode_rounds(model, prompts, subject.batches, subject.new_tokens, subject.rounds, cache)
        cell["equal_by_default"] = equal_tokens(model, prompts, subject.new_tokens)
    return cell | {"equal_if_invariant": equal_if_invariant(subject, experts, cache, prompts)}


def equal_if_invariant(subject: Subject, experts: str, cache: Path, prompts: list[list[int]]) -> int:
    """How many prompts have equal tokens alone and in a batch that is told to keep them.

    On one thread: with more, some machines' products cannot keep them, and a model that should is refused.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with subject.load(experts, cache, invariant=True) as model:
        equal = equal_tokens(model, prompts, subject.new_tokens)
    torch.set_num_threads(threads)
    return equal


def served(subject: Subject, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Goodput with a quarter of the experts in slots."""
    with subject.load("disk", cache, args.policy) as model:
        ids = ids_of(model)

    def ready() -> MoEModel:
        """Has decoded batches of every size that steps are compiled in: a trial must not wait for a compiler."""
        model = subject.load("disk", cache, args.policy)
        for size in SIZES:
            model.generate(passages(ids, size, PROMPT_TOKENS), max_tokens=subject.new_tokens)
        return model

    return {"model": subject.name, **goodputs(ready, ids, subject.trials)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    began, busy_before, foreign = time.perf_counter(), foreign_cpu(1.0), ForeignCpu()
    torch.set_num_threads(args.threads)
    result = conditions("bench_batching", args.quick) | {"threads": args.threads, "decode_mode": args.decode_mode}
    result |= {"cells": [], "goodput": []}
    with tempfile.TemporaryDirectory() as folder, foreign.measure():
        for subject in subjects(args, Path(folder)):
            cache = Path(folder) / f"packs of {subject.name}"
            for experts in args.experts if "decode" in args.parts else ():
                result["cells"].append(decoded(subject, experts, args, cache))
            if "goodput" in args.parts:
                result["goodput"].append(served(subject, args, cache))
    busy = {"foreign_cpu_before": busy_before, "foreign_cpu": foreign.share, "foreign_cpu_after": foreign_cpu(1.0)}
    result |= {"idle": busy, "checks": batching_report.judged(result["cells"])}
    return result | {"targets": batching_report.targets(result), "seconds": time.perf_counter() - began}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("bard", "random"), default=["bard", "random"])
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=EXPERTS, help="where experts are (both)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (both)")
    parser.add_argument("--policy", default="duoserve", help="with experts on the disk (default: duoserve)")
    parser.add_argument("--decode-mode", choices=("auto", "compiled"), default="compiled", help="(default: compiled)")
    parser.add_argument("--threads", type=int, default=2, help="that compute (default: 2)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of a trial of goodput, at least (default: 40)")
    parser.add_argument("--folder", type=Path, help="where the random model is, or will be (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="few steps, tiny: a check of the bench, no figures")
    parser.add_argument("--json", type=result_file, help="write all of it to this file, the curves beside it as SVG")
    return parser.parse_args()


def main() -> int:
    """0, or 1 when a batch changed a token though it was invariant."""
    args = arguments()
    result = run(args)
    print(batching_report.render(result, args.json and args.json.with_suffix(".svg").name))
    if args.json is not None:
        write_result(args.json, result)
        batching_plot.draw(args.json.with_suffix(".svg"), result)
    return 0 if all(check["passed"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
