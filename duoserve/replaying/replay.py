"""A trace replayed through the real scheduler, on the clock of a made-up machine: what a policy would have cost.

T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from duoserve.config import Phase
from duoserve.experts.copy_engine import CopyEngine, CopyListener
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool
from duoserve.experts.tickets import PIECE_BYTES
from duoserve.experts.virtual import ComputeLane, VirtualClock, VirtualCopyEngine
from duoserve.metrics import ByteCounts, Meter
from duoserve.replaying.cache_study import belady_hits, least_copies, steps_of
from duoserve.replaying.foreseen import Future
from duoserve.replaying.hardware import Machine
from duoserve.replaying.host_time import HostTime, UntimedEngine
from duoserve.replaying.scored import Score, ScoredPredictor
from duoserve.replaying.virtual_readers import HostLane, VirtualReaders
from duoserve.scheduling.eviction import Eviction
from duoserve.scheduling.plan import DecodeFetch, GuessMode, PrefillFetch
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import Routing, RoutingListener
from duoserve.scheduling.scheduler import Scheduler
from duoserve.scheduling.source import Lease, ReadyExpert
from duoserve.traces.trace import RequestTrace, Trace

ORACLE = "oracle"
# No bytes move in a replay: the slots of its pool are as small as slots can be.
_NO_BYTES = ExpertLayout(torch.bfloat16, hidden=32, intermediate=16)


@dataclass
class Replay:
    """The figures of one policy's replay. Seconds are the made-up machine's."""

    policy: str
    predictor: str | None
    num_slots: int
    ttft_s: list[float] = field(default_factory=list)  # by request
    itl_s: list[float] = field(default_factory=list)  # by decoded token
    total_s: float = 0.0  # of all requests
    prefill_stall_s: float = 0.0
    decode_stall_s: float = 0.0
    hits: int = 0  # of decode steps, as is all below
    misses: int = 0
    bytes: ByteCounts = field(default_factory=ByteCounts)
    score: Score | None = None

    @property
    def num_tokens(self) -> int:
        """Decoded tokens, those of the prompts' passes not included."""
        return len(self.itl_s)

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts that were READY when a decode step asked for them."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def ttft_mean_s(self) -> float:
        """Mean time to first token."""
        return float(np.mean(self.ttft_s))

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a decode step; None without one."""
        return float(np.mean(self.itl_s)) if self.itl_s else None

    def itl_percentile_s(self, percent: float) -> float | None:
        """That percentile of the decode steps' times; None without one."""
        return float(np.percentile(self.itl_s, percent)) if self.itl_s else None


class Watcher(NamedTuple):
    """What is called with the work of a replay's lanes: copies, and what is computed (start, end, layer)."""

    on_copied: CopyListener | None = None
    on_computed: Callable[[float, float, int], None] | None = None


NOBODY = Watcher()


def replay(  # noqa: PLR0913
    trace: Trace,
    policy: Policy,
    machine: Machine,
    num_slots: int,
    *,
    predictor: Predictor | None = None,
    watcher: Watcher = NOBODY,
    host_clock: Callable[[], float] | None = None,
) -> Replay:
    """Replays all requests, one after the other, as one process would serve them; see ``oracle_of`` for the oracle.

    With ``host_clock`` (seconds of this thread's work) the scheduler's and the predictor's own work takes the time that
    it takes here, and no two replays are quite alike; it is quicker here than between computing, unless the ``watcher``
    really computes something. MemoryBudgetError if ``policy`` cannot work with ``num_slots`` slots.
    """
    run = _Run(trace, policy, machine, num_slots, predictor, watcher, host_clock)
    if policy.all_resident:
        run.load_all()
    for request in trace:
        run.serve(request)
    return run.result


def oracle_of(trace: Trace) -> tuple[Policy, Predictor]:
    """The best policy known: it knows the future, and keeps experts by Belady's rule in one pool for all layers."""
    future = Future(list(trace), trace.meta.layers, trace.meta.num_experts)
    eviction = Eviction(future.ranking, per_layer=False)
    policy = Policy(
        ORACLE, PrefillFetch.OVERLAP, DecodeFetch.CACHE, eviction, predictor=ORACLE, guesses=GuessMode.BUDGET
    )
    return policy, future


def least_bytes(trace: Trace, machine: Machine, num_slots: int) -> float:
    """Bytes that a decoded token costs at least, whatever is done with ``num_slots`` slots: see ``least_copies``."""
    return least_copies(trace, num_slots) * machine.sizes.expert_bytes / _decoded(trace)


def layer_belady_bytes(trace: Trace, machine: Machine, num_slots: int) -> float:
    """Bytes that a decoded token costs with Belady's caches, one for each layer with an even share of the slots.

    They are empty at first, and prompts fill nothing: one pool of slots, or one that is filled, may do with less.
    """
    hits = belady_hits(trace, num_slots // len(trace.meta.layers))
    return (hits.uses - hits.hits) * machine.sizes.expert_bytes / _decoded(trace)


def _decoded(trace: Trace) -> int:
    return max(1, sum(int(total - prompt) for total, prompt in trace.requests_R2))


class _Asked(NamedTuple):
    """What ``layer`` asks for in a pass of ``num_tokens`` tokens: experts, the most wanted first.

    ``counts`` are their numbers of tokens, and ``seconds`` has, by expert, how long computing it takes.
    """

    layer: int
    num_tokens: int
    experts: list[int]
    counts: list[int]
    seconds: dict[int, float]


class _Run:
    """One policy on a virtual machine."""

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        trace: Trace,
        policy: Policy,
        machine: Machine,
        num_slots: int,
        predictor: Predictor | None,
        watcher: Watcher,
        host_clock: Callable[[], float] | None,
    ) -> None:
        self._machine = machine
        self._layers = trace.meta.layers
        self._clock = VirtualClock()
        self._lane, engine = _lanes(machine, self._clock, watcher.on_copied)
        self._copied = engine if isinstance(engine, VirtualReaders) else None
        self._host: AbstractContextManager[None] = nullcontext()
        if host_clock is not None:
            self._host = host = HostTime(self._clock, host_clock)
            engine = UntimedEngine(engine, host)
        self._meter = Meter(lambda: self._clock.now)
        self._on_computed = watcher.on_computed
        scored = None if predictor is None else ScoredPredictor(predictor)
        pool = SlotPool(num_slots, _NO_BYTES)
        self._scheduler = Scheduler(trace.meta.shape, pool, engine, policy, self._meter, scored)
        heard = self._scheduler.listener
        self._listener = heard
        guesses = scored is not None and heard is not None
        self.result = Replay(
            policy.name, scored.name if scored and guesses else None, num_slots, score=scored.score if scored else None
        )

    def load_all(self) -> None:
        """Every expert into its slot, as it is done when a model is loaded."""
        self._scheduler.load_all()

    def serve(self, request: RequestTrace) -> None:
        """One request from its prompt to its last token."""
        result, begun = self.result, self._clock.now
        asked = [_prompt_of(request, layer, self._machine) for layer in self._layers]
        ttft_s, stall_s = self._pass(Phase.PREFILL, request, 0, asked)
        result.ttft_s.append(ttft_s)
        result.prefill_stall_s += stall_s
        before = self._meter.snapshot().bytes
        for step, chosen in enumerate(zip(*_tokens_of(request, self._layers), strict=True), start=1):
            asked = [self._one_token(layer, experts) for layer, experts in zip(self._layers, chosen, strict=True)]
            itl_s, stall_s = self._pass(Phase.DECODE, request, step, asked)
            result.itl_s.append(itl_s)
            result.decode_stall_s += stall_s
        stats = self._meter.snapshot()
        result.bytes += stats.bytes - before
        result.hits, result.misses = stats.hits[Phase.DECODE], stats.misses[Phase.DECODE]
        result.total_s += self._clock.now - begun

    def _one_token(self, layer: int, experts: list[int]) -> _Asked:
        return _Asked(layer, 1, experts, [1] * len(experts), dict.fromkeys(experts, self._machine.one_token_s))

    def _pass(self, phase: Phase, request: RequestTrace, step: int, asked: Sequence[_Asked]) -> tuple[float, float]:
        """A forward pass; returns its seconds, and in how many of them the compute lane stood still."""
        begun, busy_s = self._clock.now, self._lane.busy_s
        num_tokens, context = (request.num_prompt, 0) if step == 0 else (1, request.num_prompt + step - 1)
        attention_s = self._machine.attention_s(num_tokens, context)
        if self._copied is not None:
            self._copied.roused_s, self._copied.ended_s = self._machine.disturbed_s(num_tokens)
        listener, routings = self._listener, request.routing(step)
        with self._host:
            if listener is not None:
                listener.begin(phase, np.full(num_tokens, request.number, dtype=np.int64))
            self._scheduler.begin(phase, num_tokens)
        for wanted in asked:
            self._launch(wanted.layer, attention_s)
            self._lane.synchronize()  # the router's choice
            with self._host:
                lease = self._scheduler.acquire(wanted.layer, wanted.experts, wanted.counts)
            with lease:
                if listener is not None:
                    self._hear(listener, next(routings), wanted, lease)
                self._compute(wanted, lease)
        with self._host:
            self._scheduler.end()
        self._launch(self._layers[-1], self._machine.rest_s(num_tokens))
        self._lane.synchronize()
        wall_s = self._clock.now - begun
        return wall_s, wall_s - (self._lane.busy_s - busy_s)

    def _hear(self, listener: RoutingListener, routing: Routing, wanted: _Asked, lease: Lease) -> None:
        """Tells the listener of a routing, behind the layer's demands.

        A device computes the resident experts meanwhile, a host only afterwards.
        """
        if self._machine.hardware.host_computes:
            self._launch(wanted.layer, self._machine.hearing_s(wanted.num_tokens, listener.lookahead))
            self._lane.synchronize()
        else:
            with self._host:
                ready = lease.at_once()
            self._launch_experts(wanted, ready)
        with self._host:
            listener.routed(routing)
            lease.prefetch()

    def _compute(self, wanted: _Asked, lease: Lease) -> None:
        batches = iter(lease)
        while True:
            with self._host:
                ready = next(batches, None)
            if ready is None:
                return
            self._launch_experts(wanted, ready)
            if self._machine.hardware.host_computes:
                self._lane.synchronize()

    def _launch_experts(self, wanted: _Asked, ready: Sequence[ReadyExpert]) -> None:
        """The experts of a batch are one launch."""
        if ready:
            fresh = self._fresh(wanted.layer, ready)
            caches_s = fresh * self._machine.fresh_s(wanted.num_tokens)
            caches_s += (len(ready) - fresh) * self._machine.cold_s(wanted.num_tokens)
            experts_s = sum([wanted.seconds[one.expert] for one in ready])
            self._launch(wanted.layer, self._machine.launch_s + experts_s + caches_s)

    def _fresh(self, layer: int, ready: Sequence[ReadyExpert]) -> int:
        """How many have been copied since they were computed last, as far as that matters."""
        copied = self._copied
        return 0 if copied is None else sum([copied.touch(ExpertId(layer, one.expert), one.slot) for one in ready])

    def _launch(self, layer: int, seconds: float) -> None:
        start, stop = self._lane.launch(seconds)
        if self._on_computed is not None and stop > start:
            self._on_computed(start, stop, layer)


def _lanes(machine: Machine, clock: VirtualClock, on_copied: CopyListener | None) -> tuple[ComputeLane, CopyEngine]:
    """What computes and what copies: a host with its copy threads, or a device with its link."""
    hardware, nbytes = machine.hardware, machine.sizes.expert_bytes
    if hardware.readers is not None:
        threads = VirtualReaders(clock, hardware.readers, nbytes, on_copied)
        return HostLane(clock, threads), threads
    lane = ComputeLane(clock)
    pieces = None if hardware.host_computes else PIECE_BYTES  # copy threads read experts whole
    link = VirtualCopyEngine(clock, hardware.copy_s, nbytes=nbytes, piece_bytes=pieces, lane=lane, on_copied=on_copied)
    return lane, link


def _prompt_of(request: RequestTrace, layer: int, machine: Machine) -> _Asked:
    _, num_tokens, experts, counts = next(steps_of(request, layer))
    seconds = {expert: machine.expert_s(count) for expert, count in zip(experts, counts, strict=True)}
    return _Asked(layer, num_tokens, experts, counts, seconds)


def _tokens_of(request: RequestTrace, layers: Sequence[int]) -> list[list[list[int]]]:
    """The experts by layer and decoded token."""
    return [[step.experts for step in islice(steps_of(request, layer), 1, None)] for layer in layers]
