"""From what was measured to the machine that replays run on: one for a model, whatever the policy and the slots."""

from __future__ import annotations

import statistics
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from math import inf

from reality_cells import Cell
from reality_probe import COUNTS, Disturber, Probe, Rates, Stopwatch

from duoserve.experts.virtual_readers import Readers
from duoserve.scheduling.hardware import Hardware, LayerSizes, Machine
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.replay import NOBODY, Replay, Watcher, replay
from duoserve.scheduling.timed import PassTimes, TimedMachine
from duoserve.scheduling.trace import Trace


# Steps of a resident model in which each layer has so many experts read, and waits for them or does not.
DISTURBANCES = (("with a read", 1, True), ("with two reads", 2, True), ("beside a read", 1, False))


@dataclass
class Residents:
    """Cells with all experts in slots: as they are, told of the routing, and with scores of the layer ahead."""

    plain: Cell
    told: Cell
    scored: Cell
    disturbed: Cell
    watch: Stopwatch  # the listener of ``told``
    disturber: Disturber  # of ``disturbed``

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
        for name, reads, waits in DISTURBANCES:
            self.disturber.reads, self.disturber.waits = reads, waits
            rates.note(f"step {name}", self.disturbed.serve(prompt, new_tokens).tpot_s)

    def close(self) -> None:
        """Closes them all."""
        for cell in (self.plain, self.told, self.scored, self.disturbed):
            cell.close()


def readers(rates: Rates, nbytes: int, threads: int, layers: int) -> Readers:
    """The copy threads, from reads alone and from steps of a resident model in which experts were read."""
    told_s, rouse_s = rates.median("step told"), rates.median("rouse")
    waited_s = (rates.median("step with a read") - told_s) / layers
    beside_s = (rates.median("step beside a read") - told_s) / layers
    return Readers(
        threads,
        alone=nbytes / rates.median("read"),
        together=nbytes / rates.median("together"),
        queue_s=rates.median("queue"),
        rouse_s=rouse_s,
        wake_s=rates.median("wake"),
        notice_s=max(0.0, waited_s - rates.median("wake") - rates.median("read")),
        slows=max(0.0, beside_s - rouse_s) / rates.median("read"),
    )


def machine(probe: Probe, trace: Trace, threads: int, predictor: Predictor) -> TimedMachine:
    """What a resident request leaves when experts and the scheduler's work are taken off is the layers' own.

    ``predictor`` is one of the policy that plans most, duoserve, by which it is measured how much slower the host's own
    work is between computing, which leaves its caches full of weights.
    """
    rates, nbytes = probe.rates, probe.layout.slot_bytes
    launch_s = max(0.0, 2 * rates.median("one expert") - rates.median("two experts"))
    experts = tuple((count, max(1e-9, rates.median(f"expert {count}") - launch_s)) for count in COUNTS)
    fresh_s = max(0.0, rates.median("fresh expert") - rates.median("one expert"))
    layers = len(trace.meta.layers)
    hardware = Hardware("here", inf, inf, inf, 0.0, 0.0, True, readers=readers(rates, nbytes, threads, layers))
    sizes = LayerSizes("timed", nbytes, 8, 0, 0)
    hearing = {phase: _hearing(rates, phase, layers) for phase in ("prompt", "step")}
    rest = {phase: _rest(rates, phase, layers) for phase in ("prompt", "step")}
    known = {phase: PassTimes(0.0, rest[phase], *hearing[phase]) for phase in ("prompt", "step")}
    bare = TimedMachine(hardware, sizes, known["prompt"], known["step"], experts, launch_s, fresh_s)
    bare = replace(bare, hardware=replace(hardware, host_times=_host_times(probe, trace, bare, predictor)))
    done = replayed(trace, bare, "resident", trace.meta.num_experts * layers)
    missing = {
        "prompt": rates.median("prompt plain") - statistics.median(done.ttft_s),
        "step": rates.median("step plain") - statistics.median(tpots(done)),
    }
    before = {phase: max(0.0, seconds / layers) for phase, seconds in missing.items()}
    times = {p: PassTimes(before[p], known[p].rest, known[p].hearing, known[p].scores) for p in known}
    return bare.with_times(times["prompt"], times["step"])


def replayed(
    trace: Trace, machine: Machine, policy: str, slots: int, predictor: Predictor | None = None, watcher: Watcher = NOBODY
) -> Replay:
    """The policy on the trace, the time of its own planning and predicting included."""
    told, clock = deepcopy(predictor), time.thread_time
    return replay(trace, get_policy(policy), machine, slots, predictor=told, watcher=watcher, host_clock=clock)


def tpots(done: Replay) -> list[float]:
    """Of each request, the mean of its steps."""
    each = len(done.itl_s) // len(done.ttft_s)
    return [statistics.mean(done.itl_s[at : at + each]) for at in range(0, len(done.itl_s), each)]


def _host_times(probe: Probe, trace: Trace, machine: TimedMachine, predictor: Predictor) -> float:
    """The host's work in replays with an expert really computed for each launch, over that in others."""
    slots = trace.meta.num_experts * len(trace.meta.layers)

    def host_s(watcher: Watcher) -> float:
        done = replayed(trace, machine, "duoserve", slots, predictor, watcher)
        return sum(done.itl_s)

    computing = Watcher(on_computed=lambda start, stop, layer: probe.compute_one())
    nothing = replay(trace, get_policy("duoserve"), machine, slots, predictor=deepcopy(predictor))
    others = sum(nothing.itl_s)
    return (host_s(computing) - others) / (host_s(NOBODY) - others)


def _hearing(rates: Rates, phase: str, layers: int) -> tuple[float, float]:
    plain, told, scored = (rates.median(f"{phase} {name}") for name in ("plain", "told", "scored"))
    return max(0.0, told - plain) / layers, max(0.0, scored - told) / layers


def _rest(rates: Rates, phase: str, layers: int) -> float:
    """Beyond the layers: from one router's choice to the next is a layer."""
    return max(0.0, rates.median(f"{phase} told") - rates.median(f"{phase} span") * layers / (layers - 1))
