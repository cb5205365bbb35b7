"""What a replay must know of this machine, measured on one model: reads, experts, and a request with all in slots.

T tokens, K top-k, H hidden, I expert intermediate, S slots, R = T * K routed rows.
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from duoserve import kernels
from duoserve.config import Phase
from duoserve.experts.copy_engine import ThreadedCopyEngine
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.layout import ExpertId
from duoserve.experts.pack_folder import pack_path
from duoserve.experts.packing import write_pack
from duoserve.experts.slots import SlotPool
from duoserve.experts.tickets import Priority, Ticket
from duoserve.kernels import HostWork
from duoserve.models.layers import Linear
from duoserve.models.opened import opened
from duoserve.models.tap import RouterSite, RoutingTap
from duoserve.replaying.virtual_readers import WARM_SLOTS
from duoserve.scheduling.routing import Routing

SLOTS = 16
BURST = 24  # copies in a row; so many rates are measured on
PAIRS = 8  # of copies at once, pair by pair
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)  # tokens of an expert


class Stopwatch:
    """A RoutingListener that notes when it was told of the first and the last layer of a pass, and wants scores."""

    def __init__(self, lookahead: int) -> None:
        self.lookahead = lookahead
        self.phase = Phase.PREFILL
        self.passes: list[list[float]] = []

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        self.phase = phase
        self.passes.append([])

    def routed(self, routing: Routing) -> None:
        self.passes[-1].append(time.perf_counter())

    def spans(self) -> list[float]:
        """Of each pass since the last time, seconds from the first to the last layer."""
        passes, self.passes = self.passes, []
        return [told[-1] - told[0] for told in passes]


class Disturber(Stopwatch):
    """Has ``reads`` experts read in each layer of a ``disturbed`` pass, and waits for them if it is told to."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(0)
        self._probe = probe
        self.reads, self.waits, self.disturbed = 0, False, Phase.DECODE
        self.tickets: list[Ticket] = []
        self.woken = 0

    def routed(self, routing: Routing) -> None:
        if self.phase is self.disturbed:
            busy = sum(not ticket.finished for ticket in self.tickets)
            self.woken += min(self.reads, max(0, self._probe.threads - busy))
            self.tickets += self._probe.disturb(self.reads, self.waits)

    def counts(self, until: float) -> tuple[int, int]:
        """How often a sleeping thread was asked to read, and how many reads had ended by then; drops the rest."""
        ended = sum(ticket.finished and (ticket.finished_at or 0.0) < until for ticket in self.tickets)
        self._probe.drop(self.tickets)
        woken, self.woken, self.tickets = self.woken, 0, []
        return woken, ended


@dataclass
class Rates:
    """What was measured, by name: seconds, and in ``woken`` and ``ended`` how often that happened in a pass."""

    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, *values: float) -> None:
        self.figures.setdefault(name, []).extend(values)

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])


class Probe:
    """The pack of ``model`` in ``cache`` and slots to read into; ``rates`` collects what is measured."""

    def __init__(self, model: str, cache: Path, threads: int, resources: ExitStack) -> None:
        with opened(model) as found:
            self.layout = found.layout(found.config.dtype)
            path, fingerprint = pack_path(found.checkpoint, self.layout, cache), found.checkpoint.fingerprint()
            if not path.exists():
                write_pack(found.expert_store(found.config.dtype), found.experts, path, fingerprint)
            self._experts = found.experts
            self._dtype, size = found.config.dtype, (found.config.num_layers, found.config.num_experts)
            self._top_k = found.config.top_k
        self.store = DiskStore(path, self.layout, *size, None)
        resources.callback(self.store.close)
        self._pool = SlotPool(SLOTS, self.layout)
        self._engines = [
            resources.enter_context(closing(ThreadedCopyEngine(self.store, self._pool, n))) for n in (1, threads)
        ]
        self.threads = threads
        self._random = random.Random(0)
        self._slot = 0
        self._next = 0  # the slot that is read into next: no cache has the memory of one that was used long ago
        for slot in range(SLOTS):
            self.store.read(self._any(), self._pool.row(slot))
        self.rates = Rates()

    def reads(self) -> None:
        """Reads one after another, by one thread and by all; into slots that were used long ago or just before."""
        for name, engine in zip(("alone", "together"), self._engines, strict=True):
            self.rates.note(name, self._burst(engine))
        for name, slots in (("cold", SLOTS), ("warm", WARM_SLOTS)):
            self.rates.note(name, *self._in_turn(slots))

    def drop(self, tickets: list[Ticket]) -> None:
        """Cancels what is queued of these copies, and waits for the rest."""
        for ticket in tickets:
            self._engines[-1].cancel(ticket)
        while left := [ticket for ticket in tickets if not ticket.finished]:
            self._engines[-1].wait(left)

    def disturb(self, reads: int, waits: bool) -> list[Ticket]:
        """So many copies by threads that sleep; what they took is noted if they are waited for."""
        engine, tickets = self._engines[-1], []
        for _ in range(reads):
            begun = time.perf_counter()
            tickets += self._submit(engine, 1)
            if reads == 1:
                self.rates.note("rouse", time.perf_counter() - begun)
        left = tickets if waits else []
        while left:
            engine.wait(left)
            left = [ticket for ticket in left if not ticket.finished]
        if waits:
            self._note_waited(tickets, time.perf_counter())
        return tickets

    def _note_waited(self, tickets: list[Ticket], now: float) -> None:
        for ticket in tickets:
            assert ticket.started_at is not None and ticket.finished_at is not None
            self.rates.note("read" if len(tickets) == 1 else "read of all", ticket.finished_at - ticket.started_at)
            if len(tickets) == 1:
                self.rates.note("wake", ticket.started_at - ticket.issued_at)
                self.rates.note("notice", now - ticket.finished_at)

    @torch.inference_mode()
    def compute_one(self) -> None:
        """What an expert leaves in the caches."""
        self._computed(1, 1)

    @torch.inference_mode()
    def experts(self, rows: int) -> None:
        """Experts in slots, for so many tokens each, and for ``rows`` as in a prompt; two in one launch."""
        # At first no cache has them, as when a prompt comes; then the last one has, as in one step after another.
        self.rates.note("cold used expert", *(self._computed(rows, 1) for _ in range(SLOTS)))
        for count in COUNTS:
            self.rates.note(f"expert {count}", *(self._computed(count, 1) for _ in range(3)))
        for _ in range(9):
            self.rates.note("two experts", self._computed(1, 2))
            self.rates.note("one expert", self._computed(1, 1))
            self.rates.note("used expert", self._computed(rows, 1))
            for name, count in (("fresh expert", 1), ("fresh used expert", rows)):
                self.store.read(self._any(), self._pool.row(self._slot))
                self.rates.note(name, self._computed(count, 1))

    @torch.inference_mode()
    def listening(self, tokens: int) -> None:
        """To tell a listener of a layer's routing of a prompt, without scores of the next layer and with them."""
        hidden, num_experts = self.layout.hidden, 1 + max(one.expert for one in self._experts)
        x_TH = torch.ones(tokens, hidden, dtype=self._dtype)
        sites = [
            RouterSite(
                layer, Linear(torch.ones(num_experts, hidden, dtype=self._dtype)), torch.ones(hidden, dtype=self._dtype)
            )
            for layer in range(2)
        ]
        ids_TK, weights_TK = torch.zeros(tokens, self._top_k, dtype=torch.int64), torch.ones(tokens, self._top_k)
        for name, lookahead in (("told of a prompt", 0), ("told of a prompt with scores", 1)):
            tap = RoutingTap(Stopwatch(lookahead), sites)
            tap.begin(Phase.PREFILL, np.zeros(tokens, dtype=np.int64))
            for _ in range(9):
                self.compute_one()
                begun = time.perf_counter()
                tap.routed(0, x_TH, weights_TK, ids_TK)
                self.rates.note(name, time.perf_counter() - begun)

    def _burst(self, engine: ThreadedCopyEngine) -> float:
        """Seconds for each of some copies in a row, from the end of the first."""
        left = tickets = self._submit(engine, 4)
        begun = time.perf_counter()
        tickets += self._submit(engine, BURST - 4)
        self.rates.note("queue", (time.perf_counter() - begun) / (BURST - 4))
        while left:
            engine.wait(left)
            left = [ticket for ticket in left if not ticket.finished]
        ends = sorted(ticket.finished_at or 0.0 for ticket in tickets)
        return (ends[-1] - ends[3]) / (BURST - 4)

    @torch.inference_mode()
    def _in_turn(self, slots: int) -> list[float]:
        """Seconds of some reads of two experts at once, into so many slots in turn; what has come is computed."""
        engine, seconds = self._engines[-1], []
        for at in range(PAIRS):
            self._slot = first = 2 * at % slots
            begun = time.perf_counter()
            left = [engine.submit(self._any(), slot, Priority.DEMAND) for slot in (first, first + 1)]
            while left:
                engine.wait(left)
                left = [ticket for ticket in left if not ticket.finished]
            seconds.append(time.perf_counter() - begun)
            self._computed(1, 2)
        return seconds[1:]

    def _submit(self, engine: ThreadedCopyEngine, count: int) -> list[Ticket]:
        first, self._next = self._next, (self._next + count) % SLOTS
        return [engine.submit(self._any(), (first + at) % SLOTS, Priority.DEMAND) for at in range(count)]

    def _computed(self, count: int, experts: int) -> float:
        """Seconds of ``experts`` experts in slots that were not read lately, with ``count`` tokens each."""
        hidden, inner = self.layout.hidden, self._pool.weights.w2.inner
        x_TH = torch.ones(count, hidden, dtype=self._dtype)
        ids_TK = torch.arange(experts).repeat(count, 1)
        plan = kernels.route_plan(ids_TK, torch.full((8,), -1, dtype=torch.int32))
        act_RI, y_RH = x_TH.new_empty(ids_TK.numel(), inner), x_TH.new_empty(ids_TK.numel(), hidden)
        pairs = [(e, (self._slot + e) % SLOTS) for e in range(experts)]
        self._slot = (self._slot + experts) % SLOTS
        begun = time.perf_counter()
        work = HostWork.of(pairs)
        kernels.moe_up(x_TH, self._pool.weights, plan, work, act_RI)
        kernels.moe_down(act_RI, self._pool.weights, plan, work, y_RH)
        return time.perf_counter() - begun

    def _any(self) -> ExpertId:
        return self._random.choice(self._experts)
