"""From what was measured to the machine that replays run on: one for a model, whatever the policy and the slots."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import inf
from typing import Self

import numpy as np

from duoserve.config import EngineConfig, Phase
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from duoserve.replaying.replay import Replay, Watcher, replay
from duoserve.replaying.virtual_readers import Readers
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.traces.trace import Trace
from reality.cells import Cell, Served, Setting
from reality.probe import COUNTS, Disturber, Probe, Rates, Stopwatch
from reality.timed_machine import PassTimes, TimedMachine

MANY = 8
# Passes of a resident model in which each layer has so many experts read, and waits for them or does not.
Disturbance = tuple[str, Phase, int, bool]
DISTURBANCES: tuple[Disturbance, ...] = (
    ("step with a read", Phase.DECODE, 1, True),
    ("step with reads", Phase.DECODE, EngineConfig().copy_threads, True),
    *((f"step beside {reads}", Phase.DECODE, reads, False) for reads in (1, 2, MANY)),
    (f"prompt beside {MANY}", Phase.PREFILL, MANY, False),
)


@dataclass
class Residents:
    """Cells with all experts in slots: as they are, told of the routing, and with scores of the layer ahead."""

    plain: Cell
    told: Cell
    scored: Cell
    disturbed: Cell
    watch: Stopwatch  # the listener of ``told``
    disturber: Disturber  # of ``disturbed``
    order: list[str] = field(default_factory=lambda: ["plain", "told", "scored"])

    @classmethod
    def load(cls, setting: Setting, probe: Probe, total: int, resources: ExitStack) -> Self:
        """All four, with slots for ``total`` experts."""
        watch, disturber = Stopwatch(0), Disturber(probe)
        listeners = (None, watch, Stopwatch(1), disturber)
        cells = [Cell(setting, "resident", total, resources, listener=listener) for listener in listeners]
        return cls(*cells, watch, disturber)

    def note(self, rates: Rates, prompt: list[int], new_tokens: int) -> None:
        """A request to each, undisturbed and disturbed."""
        self.plain.served.append(self.again(rates, prompt, new_tokens))
        for disturbance in DISTURBANCES:
            self._disturb(rates, disturbance, prompt, new_tokens)

    def _disturb(self, rates: Rates, disturbance: Disturbance, prompt: list[int], new_tokens: int) -> None:
        name, phase, reads, waits = disturbance
        watch, prefills = self.disturber, phase is Phase.PREFILL
        watch.disturbed, watch.reads, watch.waits = phase, reads, waits
        begun = time.perf_counter()
        served = self.disturbed.serve(prompt, 2 if prefills else new_tokens)
        woken, ended = watch.counts(begun + served.ttft_s if prefills else time.perf_counter())
        passes = 1 if prefills else new_tokens - 1
        rates.note(name, served.ttft_s if prefills else served.tpot_s)
        rates.note(f"{name} woken", woken / passes)
        rates.note(f"{name} ended", ended / passes)

    def again(self, rates: Rates, prompt: list[int], new_tokens: int) -> Served:
        """A request to each that nothing disturbs, and where its time went; what the plain one came to.

        They take turns in being the first, which is slower.
        """
        self.order = [*self.order[1:], self.order[0]]
        served = {name: getattr(self, name).serve(prompt, new_tokens) for name in self.order}
        for name, one in served.items():
            rates.note(f"prompt {name}", one.ttft_s)
            rates.note(f"step {name}", one.tpot_s)
        first, *others = self.watch.spans()
        rates.note("prompt span", first)
        rates.note("step span", statistics.mean(others))
        return served["plain"]


def readers(rates: Rates, nbytes: int, threads: int, layers: int) -> Readers:
    """The copy threads, from reads alone and from steps of a resident model in which experts were read."""
    read_s, all_s, wake_s, notice_s = (rates.median(name) for name in ("read", "read of all", "wake", "notice"))
    waited_s = (rates.median("step with a read") - rates.median("step told")) / layers
    return Readers(
        threads,
        alone=nbytes / read_s,
        together=threads * nbytes / all_s,
        queue_s=rates.median("queue"),
        rouse_s=rates.median("rouse"),
        wake_s=wake_s,
        between_s=max(0.0, threads * rates.median("together") - all_s),
        notice_s=notice_s,
        resumed_s=max(0.0, waited_s - wake_s - read_s - notice_s),
        warm=max(1.0, rates.median("cold") / rates.median("warm")),
    )


def disturbed(rates: Rates, phase: str) -> tuple[float, float]:
    """What computing loses to a thread that is woken and to a read that ends beside it, by least squares.

    Of prompts, which were disturbed in one way only, both are taken to be alike.
    """
    names = [name for name, *_ in DISTURBANCES if name.startswith(f"{phase} beside")]
    counts = np.array([[rates.median(f"{name} {what}") for what in ("woken", "ended")] for name in names])
    longer = np.array([rates.median(name) for name in names]) - rates.median(f"{phase} told")
    lost = longer - rates.median("rouse") * counts[:, 0]
    if phase == "prompt":
        each = max(0.0, float(lost[0] / counts[0].sum()))
        return each, each
    both = np.linalg.lstsq(counts, lost, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = np.maximum(0.0, counts.T @ lost / (counts * counts).sum(0))  # one of them is nothing: the other by itself
    return (0.0, float(alone[1])) if both[0] < both[1] else (float(alone[0]), 0.0)


def machine(probe: Probe, trace: Trace, threads: int) -> TimedMachine:
    """What a resident request leaves when experts and the scheduler's work are taken off is the layers' own."""
    rates, nbytes = probe.rates, probe.layout.slot_bytes
    launch_s = max(0.0, 2 * rates.median("one expert") - rates.median("two experts"))
    experts = tuple((count, max(1e-9, rates.median(f"expert {count}") - launch_s)) for count in COUNTS)
    layers = len(trace.meta.layers)
    hardware = Hardware(
        "here", inf, inf, inf, 0.0, 0.0, host_computes=True, readers=readers(rates, nbytes, threads, layers)
    )
    sizes = LayerSizes("timed", nbytes, 8, 0, 0)
    known = {phase: _known(rates, phase, layers) for phase in ("prompt", "step")}
    bare = TimedMachine(hardware, sizes, known["prompt"], known["step"], experts, launch_s)
    done = replayed(probe, trace, bare, "resident", trace.meta.num_experts * layers)
    missing = {
        "prompt": undisturbed(rates, "prompt", layers) - statistics.median(done.ttft_s[1:]),
        "step": undisturbed(rates, "step", layers) - statistics.median(tpots(done)[1:]),
    }
    times = {p: replace(known[p], before=max(0.0, seconds / layers)) for p, seconds in missing.items()}
    return bare.with_times(times["prompt"], times["step"])


def undisturbed(rates: Rates, phase: str, layers: int) -> float:
    """A resident pass, from cells that listen and cells that do not: what telling takes is taken off.

    They do the same with other memory, and one of them was up to a fifth faster than another for a whole run.
    """
    hearing_s, scores_s = listening(rates, phase, layers)
    telling_s = {"plain": 0.0, "told": hearing_s * layers, "scored": (hearing_s + scores_s) * layers}
    return statistics.mean(rates.median(f"{phase} {name}") - seconds for name, seconds in telling_s.items())


def _known(rates: Rates, phase: str, layers: int) -> PassTimes:
    """What is measured of a pass's times by itself."""
    which = "used expert" if phase == "prompt" else "one expert"
    fresh = f"fresh {'used ' if phase == 'prompt' else ''}expert"
    roused_s, ended_s = disturbed(rates, phase)
    told_s = rates.median(f"{phase} told")
    hearing_s, scores_s = listening(rates, phase, layers)
    return PassTimes(
        rest=max(0.0, told_s - rates.median(f"{phase} span") * layers / (layers - 1)),
        hearing=hearing_s,
        scores=scores_s,
        fresh=max(0.0, rates.median(fresh) - rates.median(which)),
        cold=max(0.0, rates.median("cold used expert") - rates.median(which)) if phase == "prompt" else 0.0,
        roused=roused_s,
        ended=ended_s,
    )


def listening(rates: Rates, phase: str, layers: int) -> tuple[float, float]:
    """What it takes in a layer to tell a listener of the routing, and beyond that to make scores of the next layer.

    Of steps, which are many, by the difference of whole requests. A prompt's time differs by more than that from one
    request to the next, so what tells the listener was timed by itself.
    """
    if phase == "prompt":
        without_s, with_s = rates.median("told of a prompt"), rates.median("told of a prompt with scores")
        return without_s, max(0.0, with_s - without_s)
    plain_s, told_s, scored_s = (rates.median(f"step {name}") for name in ("plain", "told", "scored"))
    return max(0.0, told_s - plain_s) / layers, max(0.0, scored_s - told_s) / layers


def replayed(  # noqa: PLR0913, PLR0917
    probe: Probe, trace: Trace, machine: Machine, policy: str, slots: int, predictor: Predictor | None = None
) -> Replay:
    """The policy on the trace. Its own planning and predicting take the time that they take here.

    An expert is really computed for each launch, for planning is slower where caches are full of weights.
    """
    watcher = Watcher(on_computed=lambda start, stop, layer: probe.compute_one())
    told, clock = deepcopy(predictor), time.thread_time
    return replay(trace, get_policy(policy), machine, slots, predictor=told, watcher=watcher, host_clock=clock)


def tpots(done: Replay) -> list[float]:
    """Of each request, the mean of its steps."""
    each = len(done.itl_s) // len(done.ttft_s)
    return [statistics.mean(done.itl_s[at : at + each]) for at in range(0, len(done.itl_s), each)]
