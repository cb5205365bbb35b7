"""From what was measured to the machine that replays run on: one for a model, whatever the policy and the slots."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from math import inf

from reality_cells import Cell
from reality_probe import COUNTS, Probe, Rates, Stopwatch

from duoserve.experts.virtual_readers import Readers
from duoserve.scheduling.hardware import Hardware, LayerSizes
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.replay import Replay, replay
from duoserve.scheduling.timed import PassTimes, TimedMachine
from duoserve.scheduling.trace import Trace


@dataclass
class Residents:
    """Cells with all experts in slots: as they are, told of the routing, and with scores of the layer ahead."""

    plain: Cell
    told: Cell
    scored: Cell
    watch: Stopwatch  # the listener of ``told``

    def note(self, rates: Rates, prompt: list[int], new_tokens: int) -> None:
        """A request to each, and where its time went."""
        self.plain.round(prompt, new_tokens)
        for name, cell in (("plain", self.plain), ("scored", self.scored), ("told", self.told)):
            served = self.plain.served[-1] if cell is self.plain else cell.serve(prompt, new_tokens)
            rates.note(f"prompt {name}", served.ttft_s)
            rates.note(f"step {name}", served.tpot_s)
        first, *others = self.watch.spans()
        rates.note("prompt span", first)
        rates.note("step span", statistics.mean(others))

    def close(self) -> None:
        """Closes all three."""
        for cell in (self.plain, self.told, self.scored):
            cell.close()


def readers(rates: Rates, nbytes: int, threads: int) -> Readers:
    """The copy threads, from reads alone and from steps of a resident model while they read."""
    step_s = rates.median("step plain")
    slower = [(rates.median(f"step under {name}") / step_s - 1) / count for name, count in (("one", 1), ("all", threads))]
    return Readers(
        threads,
        alone=nbytes / rates.median("alone"),
        together=nbytes / rates.median("together"),
        wake_s=rates.median("wake"),
        notice_s=rates.median("notice"),
        slows=max(0.0, statistics.mean(slower)),
        slowed=max(0.0, rates.median("read under all") / rates.median("together") - 1),
    )


def machine(probe: Probe, trace: Trace, threads: int) -> TimedMachine:
    """What a resident request leaves when experts and the scheduler's work are taken off is the layers' own."""
    rates, nbytes = probe.rates, probe.layout.slot_bytes
    launch_s = max(0.0, 2 * rates.median("one expert") - rates.median("two experts"))
    experts = tuple((count, max(1e-9, rates.median(f"expert {count}") - launch_s)) for count in COUNTS)
    hardware = Hardware("here", inf, inf, inf, 0.0, 0.0, True, readers=readers(rates, nbytes, threads))
    sizes = LayerSizes("timed", nbytes, 8, 0, 0)
    layers = len(trace.meta.layers)
    hearing = {phase: _hearing(rates, phase, layers) for phase in ("prompt", "step")}
    rest = {phase: _rest(rates, phase, layers) for phase in ("prompt", "step")}
    known = {phase: PassTimes(0.0, rest[phase], *hearing[phase]) for phase in ("prompt", "step")}
    bare = TimedMachine(hardware, sizes, known["prompt"], known["step"], experts, launch_s)
    done = replayed(trace, bare, "resident", trace.meta.num_experts * layers)
    missing = {
        "prompt": rates.median("prompt plain") - statistics.median(done.ttft_s),
        "step": rates.median("step plain") - statistics.median(tpots(done)),
    }
    before = {phase: max(0.0, seconds / layers) for phase, seconds in missing.items()}
    times = {p: PassTimes(before[p], known[p].rest, known[p].hearing, known[p].scores) for p in known}
    return bare.with_times(times["prompt"], times["step"])


def replayed(trace: Trace, machine: TimedMachine, policy: str, slots: int, predictor: object = None) -> Replay:
    """The policy on the trace, the time of its own planning and predicting included."""
    return replay(
        trace, get_policy(policy), machine, slots, predictor=predictor, host_clock=time.thread_time  # type: ignore[arg-type]
    )


def tpots(done: Replay) -> list[float]:
    """Of each request, the mean of its steps."""
    each = len(done.itl_s) // len(done.ttft_s)
    return [statistics.mean(done.itl_s[at : at + each]) for at in range(0, len(done.itl_s), each)]


def _hearing(rates: Rates, phase: str, layers: int) -> tuple[float, float]:
    plain, told, scored = (rates.median(f"{phase} {name}") for name in ("plain", "told", "scored"))
    return max(0.0, told - plain) / layers, max(0.0, scored - told) / layers


def _rest(rates: Rates, phase: str, layers: int) -> float:
    """Beyond the layers: from one router's choice to the next is a layer."""
    return max(0.0, rates.median(f"{phase} told") - rates.median(f"{phase} span") * layers / (layers - 1))
