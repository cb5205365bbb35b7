"""What the host does in a decode step in event mode, apart from the model and the device: microseconds a layer.

    python bench/bench_host.py [--json OUT] [--rounds 5]

The scheduler, the copy engine of a GPU and the work lists are the real ones. There is no device: what it is asked for
is counted, for on a GPU each such call takes the host time as well, which is not measured here. Misses take the host
longer than hits, but most of that passes while the first of them is copied. The ceiling is what event mode may take a
layer in all: 40 us. A figure is a median over steps; its median and extremes are those of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.streams import Lane, Mark, Streams
from duoserve.kernels import by_demand
from duoserve.kernels.recorder import Recorder
from duoserve.launching.inputs import WorkFeed
from duoserve.metrics import Meter
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.scheduler import Scheduler
from harness import Summary, result_file, write_result
from machine import conditions
from tables import markdown, software

CEILING_US = 40.0
STEPS, WARM_STEPS = 100, 60
LAYOUT = ExpertLayout(torch.bfloat16, hidden=32, intermediate=16)


@dataclass(frozen=True)
class Case:
    """``layers`` of ``experts``, of which a token takes ``top_k``; so many of these are in no slot."""

    name: str
    policy: str
    layers: int
    experts: int
    top_k: int
    slots_per_layer: int
    misses: int

    def wanted(self, step: int) -> list[int]:
        """What every layer's router chooses: some are chosen in every step, the others in turn, too many to be kept."""
        kept = self.top_k - self.misses
        others = self.experts - kept
        return [*range(kept), *(kept + (step * self.misses + i) % others for i in range(self.misses))]


CASES = [
    Case(f"{model}, {policy}, {misses} misses", policy, *shape, misses)
    for model, shape in {"Qwen3-30B-A3B": (48, 128, 8, 32), "Mixtral-8x7B": (32, 8, 2, 3)}.items()
    for policy in ("lru", "duoserve")
    for misses in (0, 1, 2)
]


class At(Mark):
    """Passed at the next router's choice, for which the host waits."""

    def __init__(self, choice: int) -> None:
        self.choice = choice


class NoDevice(Streams):
    """Moves no byte and has done everything at the next router's choice; ``calls`` counts what a GPU would be asked."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.choice = 0

    def mark(self, lane: Lane) -> Mark:
        """As in Streams."""
        self.calls["mark"] += 1
        return At(self.choice)

    def after(self, lane: Lane, mark: Mark) -> None:
        """As in Streams."""
        self.calls["after"] += 1

    def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
        """As in Streams."""
        self.calls["copy"] += 1

    def passed(self, mark: Mark) -> bool:
        """As in Streams."""
        self.calls["passed"] += 1
        assert isinstance(mark, At)
        return mark.choice < self.choice

    def wait(self, mark: Mark) -> None:
        """As in Streams."""

    def seconds(self, earlier: Mark, later: Mark) -> float:
        """As in Streams."""
        self.calls["seconds"] += 1
        return 0.0


class InRam(ExpertStore):
    """One row for every expert."""

    layout = LAYOUT

    def __init__(self) -> None:
        self._row_B = torch.zeros(LAYOUT.slot_bytes, dtype=torch.uint8)

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """As in ExpertStore."""
        row_B.copy_(self._row_B)

    def host_row(self, expert: ExpertId) -> Tensor:
        """As in ExpertStore."""
        return self._row_B

    def close(self) -> None:
        """Nothing to release."""


class NoRecorder(Recorder):
    """Host memory, and copies that are not made."""

    device = torch.device("cpu")

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As in Recorder."""
        return torch.zeros(shape, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """As in Recorder."""


def measure(case: Case) -> dict[str, Any]:
    """Microseconds a layer over the steps, and the calls of a layer."""
    streams, store, meter = NoDevice(), InRam(), Meter()
    num_slots = case.layers * case.slots_per_layer
    pool = SlotPool(num_slots, LAYOUT)
    engine = StreamCopyEngine(store, pool, streams, on_copied=meter.copied, on_stalled=meter.stalled)
    shape = ModelShape(case.experts, case.top_k, tuple(range(case.layers)))
    scheduler = Scheduler(shape, pool, engine, get_policy(case.policy), meter)
    feed = WorkFeed(NoRecorder(), case.experts, case.top_k)
    with closing(scheduler):
        for step in range(WARM_STEPS):
            _step(scheduler, streams, feed, case, step)
        meter.reset()
        streams.calls.clear()
        seconds = [_step(scheduler, streams, feed, case, WARM_STEPS + step) for step in range(STEPS)]
    asked = STEPS * case.layers
    return {
        "name": case.name,
        "us_per_layer": 1e6 * statistics.median(seconds) / case.layers,
        "calls_per_layer": {name: count / asked for name, count in sorted(streams.calls.items())},
        "as_many_misses": meter.snapshot().misses["decode"] == asked * case.misses,
    }


def _step(scheduler: Scheduler, streams: NoDevice, feed: WorkFeed, case: Case, step: int) -> float:
    """What ``EventStep`` does between a step's recordings; returns the seconds that took."""
    choice_BK = torch.tensor([case.wanted(step)])
    began = time.perf_counter()
    scheduler.begin(Phase.DECODE, 1)
    for layer in range(case.layers):
        streams.choice += 1
        feed.rewind()
        rows = Counter(chain.from_iterable(choice_BK.tolist()))
        experts = by_demand(rows)
        with scheduler.acquire(layer, experts, [rows[expert] for expert in experts]) as lease:
            if ready := lease.at_once():
                feed.load(ready)
            for ready in lease:
                feed.load(ready)
    scheduler.end()
    return time.perf_counter() - began


def run(rounds: int) -> dict[str, Any]:
    """All cases in turn, so that whatever disturbs the machine disturbs all of them."""
    began, result = time.perf_counter(), conditions("bench_host", quick=False)
    turns = [[measure(case) for case in CASES] for _ in range(rounds)]
    result["cases"] = [
        one | {"us_per_layer": asdict(Summary.of([turn[at]["us_per_layer"] for turn in turns]))}
        for at, one in enumerate(turns[0])
    ]
    result["ceilings"] = {"us_per_layer": CEILING_US}
    result["checks"] = [{"name": "misses are the case's", "passed": all(c["as_many_misses"] for c in result["cases"])}]
    result["seconds"] = time.perf_counter() - began
    return result


def render(result: dict[str, Any]) -> str:
    """Conditions, and a line a case."""
    rows = [["case", "us a layer, median (extremes)", "of 40 us", "asked of the device, a layer"]]
    for case in result["cases"]:
        us, calls = case["us_per_layer"], case["calls_per_layer"]
        asked = ", ".join(f"{count:.0f} {name}" for name, count in calls.items() if count >= 0.5)
        spread = f"{us['median']:.1f} ({us['low']:.1f}-{us['high']:.1f})"
        rows.append([case["name"], spread, f"{us['median'] / CEILING_US:.0%}", asked])
    passed = all(check["passed"] for check in result["checks"])
    head = f"- {result['machine']['cpu']}; {software(result)}; {result['date']}: `{result['command']}`.\n"
    head += f"- {result['checks'][0]['name']}: {'passed' if passed else '**FAILED**'}."
    return f"{head}\n\n{markdown(rows)}"


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file, help="write all figures to this file")
    parser.add_argument("--rounds", type=int, default=5, help="of all cases (default %(default)s)")
    args = parser.parse_args()
    result = run(args.rounds)
    print(render(result))
    if args.json:
        write_result(args.json, result)
    return int(not all(check["passed"] for check in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
