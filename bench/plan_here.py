"""The planner against the machine that this runs on, which should be idle.

    python bench/plan_here.py --json bench/results/plan-here-NAME.json > bench/results/plan-here-NAME.md

Plans are made from the config of a model and a rehearsal of its layers (``duoserve plan --hardware this``), then the
model is run from disk and from RAM, with every policy and number of slots below. In each round a rehearsal comes just
before the runs that it is held against, for a machine that others use too changes from minute to minute; an error is
the median over the rounds of planned over measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from duoserve import MoEModel
from duoserve.config import Phase
from duoserve.experts.pack_folder import cache_folder
from duoserve.planning.formats import layout_in
from duoserve.planning.measuring import RATES
from duoserve.planning.model_cards import find_model
from duoserve.planning.planner import Planner
from duoserve.planning.policy_speed import Question
from duoserve.planning.rehearsal import RESIDENT, rehearse
from duoserve.planning.routing_curves import UNIFORM
from duoserve.planning.speed import StepSpec
from duoserve.planning.this_machine import this_machine
from duoserve.replaying.hardware import GIB, Hardware
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import get_policy
from harness import result_file, write_result
from machine import REPOSITORY, ForeignCpu, conditions, foreign_cpu
from plan_here_report import BUSY, report
from random_mixtral import ensure_checkpoint
from shapes import SHAPES

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "duoserve" / "bench"
TEXT = REPOSITORY / "tests" / "macbeth.txt"
SLOTS, POLICIES = ("25%", "50%", "75%"), ("lru", "duoserve", "on-demand")
HOST = {"disk": 0, "ram": GIB}
CONTEXT = 512
TRIES = 2
Done = TypeVar("Done")
RANDOM = "random"


@dataclass(frozen=True)
class Size:
    """How much is run: ``rounds`` of a warm-up and ``requests`` requests for each way to run a model."""

    rounds: int = 5
    requests: int = 1
    warm_up: int = 8  # new tokens
    prompt: int = 128
    new_tokens: int = 24
    slots: tuple[str, ...] = SLOTS
    policies: tuple[str, ...] = POLICIES


QUICK = Size(rounds=1, prompt=16, new_tokens=4, warm_up=2, slots=("50%",), policies=("lru", "on-demand"))


@dataclass(frozen=True)
class Subject:
    """A model that is run. ``routing`` is the card that its hit rates are planned by; None: its own or the nearest."""

    name: str
    model: str
    routing: str | None

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Of embedded models pieces of a play that they have not seen, of others random tokens."""
        described = find_model(self.model)
        if self.routing == UNIFORM:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(3, described.config.vocab_size, (count, tokens), generator=generator).tolist()
        with MoEModel.from_pretrained(self.model, device="cpu", expert_slots="100%", max_context=CONTEXT) as model:
            ids = model.encode(TEXT.read_text())
        starts = [number * (len(ids) - tokens) // max(1, count - 1) for number in range(count)]
        return [ids[start : start + tokens] for start in starts]


@dataclass(frozen=True)
class Cell:
    """One way to run a model."""

    slots: str
    policy: str
    tier: str

    def question(self, subject: Subject, size: Size) -> Question:
        """The same as a question to the planner."""
        return Question(
            prompt=size.prompt,
            new_tokens=size.new_tokens,
            expert_slots=self.slots,
            host_memory=HOST[self.tier],
            max_context=CONTEXT,
            routing=subject.routing,
        )


class Bench:
    """Runs ``subjects`` beside their plans."""

    def __init__(self, subjects: list[Subject], size: Size, folder: Path | None) -> None:
        self._subjects = subjects
        self._size = size
        self._folder = cache_folder(folder)
        self._prompts = {one.name: one.prompts(1 + size.requests, size.prompt) for one in subjects}
        self._hardware = this_machine(folder, anew=True)

    def rounds(self) -> Iterator[dict[str, Any]]:
        """What is known after each round: every round so far of every cell."""
        size = self._size
        done: dict[tuple[str, Cell], list[dict[str, Any]]] = {}
        for _ in range(size.rounds):
            for subject, tier, policy in product(self._subjects, HOST, size.policies):
                planner = self._planner(subject, policy, tier)
                for cell in [Cell(slots, policy, tier) for slots in size.slots]:
                    done.setdefault((subject.name, cell), []).append(self._round(subject, planner, cell))
            found = [asdict(cell) | {"model": name, "rounds": rounds} for (name, cell), rounds in done.items()]
            yield {"hardware": _rates(self._hardware), "size": asdict(size), "cells": found, "checks": _checks(found)}

    def _planner(self, subject: Subject, policy: str, tier: str) -> Planner:
        """With a rehearsal that has just been held."""
        described = find_model(subject.model)
        layout = layout_in(described.config, None, described.config.dtype)
        ways = [(RESIDENT, tier), (policy, tier)]
        found, _ = undisturbed(lambda: rehearse(described, layout, self._size.prompt, self._folder, ways))
        return Planner(subject.name, described, {self._hardware.name: found} if found else {})

    def _round(self, subject: Subject, planner: Planner, cell: Cell) -> dict[str, Any]:
        """What was measured, and what was planned: TPOT also with the hits that there were."""
        done, others = undisturbed(lambda: self._requests(subject, cell))
        plan = planner.plan(self._hardware, cell.question(subject, self._size))
        speed = plan.speeds[cell.policy]
        context = self._size.prompt + self._size.new_tokens // 2
        step = StepSpec(1, context, planner.model.config.top_k, done["hits"])
        return done | {
            "planned_ttft_s": speed.ttft.total,
            "planned_tpot_s": speed.tpot.total,
            "planned_hits": speed.hit_rate,
            "tpot_s_by_hits": planner.costs(plan).decode(get_policy(cell.policy), step).total,
            "foreign_cpu": others,
        }

    def _requests(self, subject: Subject, cell: Cell) -> dict[str, Any]:
        """Medians over the requests behind a warm-up."""
        warm_up, *prompts = self._prompts[subject.name]
        params = SamplingParams(max_tokens=self._size.new_tokens, temperature=0.0, ignore_eos=True)
        with MoEModel.from_pretrained(
            subject.model,
            device="cpu",
            expert_slots=cell.slots,
            policy=cell.policy,
            host_memory=HOST[cell.tier],
            max_context=CONTEXT,
            cache_dir=self._folder,
        ) as model:
            model.generate(warm_up, replace(params, max_tokens=self._size.warm_up))
            done = [model.generate(prompt, params) for prompt in prompts]
        return {
            "ttft_s": statistics.median(one.stats.ttft_s or 0.0 for one in done),
            "tpot_s": statistics.median(one.stats.tpot_s or 0.0 for one in done),
            "hits": statistics.median(one.stats.hit_rate(Phase.DECODE) or 0.0 for one in done),
            "token_ids": [one.token_ids for one in done],
        }


def undisturbed(run: Callable[[], Done]) -> tuple[Done, float]:
    """What ``run`` gives when others use hardly any CPU time; else of TRIES the one in which they used least.

    A machine that is shared stands still now and then, and nobody plans for that.
    """
    tried: list[tuple[float, Done]] = []
    for _ in range(TRIES):
        foreign = ForeignCpu()
        with foreign.measure():
            done = run()
        if foreign.share <= BUSY:
            return done, foreign.share
        tried.append((foreign.share, done))
    others, done = min(tried, key=lambda one: one[0])
    return done, others


def _rates(hardware: Hardware) -> dict[str, float]:
    return {rate: getattr(hardware, rate) for rate in RATES}


def _checks(cells: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether all cells of a model gave the same tokens in all rounds."""
    by_model: dict[str, list[Any]] = {}
    for cell in cells:
        by_model.setdefault(cell["model"], []).extend(done["token_ids"] for done in cell["rounds"])
    return {
        f"{model}: the same tokens in every cell": all(t == those[0] for t in those)
        for model, those in by_model.items()
    }


def subjects(names: list[str], folder: Path, quick: bool) -> list[Subject]:
    """The embedded models of ``names``, and "random": that of the CPU bench, made in ``folder`` if it is not there."""
    found = []
    for name in names:
        if name == RANDOM:
            shape = SHAPES["quick" if quick else "full"]
            checkpoint = folder / f"mixtral-{shape.hidden}x{shape.layers}"
            ensure_checkpoint(shape, checkpoint)
            found.append(Subject(RANDOM, str(checkpoint), UNIFORM))
        else:
            found.append(Subject(name, name, None))
    return found


def main() -> None:
    """Writes the JSON and prints the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["bard", RANDOM], help=f"embedded models, or {RANDOM}")
    parser.add_argument("--json", type=result_file, help="the result")
    parser.add_argument("--folder", type=Path, default=CACHE, help="where the random model is kept")
    parser.add_argument("--cache", type=Path, help="where packs lie (default: as always)")
    parser.add_argument("--rounds", type=int, help="how many")
    parser.add_argument("--quick", action="store_true", help="a small shape and few ways: whether it runs at all")
    args = parser.parse_args()
    size = QUICK if args.quick else Size()
    size = replace(size, rounds=args.rounds or size.rounds)
    begun, result = time.perf_counter(), conditions("plan_here", args.quick) | {"others_before": foreign_cpu(1.0)}
    for found in Bench(subjects(args.models, args.folder, args.quick), size, args.cache).rounds():
        result |= found | {"seconds": time.perf_counter() - begun}
        if args.json is not None:  # after each round, so that a run may be ended early
            write_result(args.json, result)
    result["others_after"] = foreign_cpu(1.0)
    if args.json is not None:
        write_result(args.json, result)
    print(report(result))


if __name__ == "__main__":
    main()
