"""What a replay must know of this machine, measured on one model: reads, experts, and a request with all in slots.

T tokens, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from reality_cells import Cell, Served

from duoserve import kernels
from duoserve.config import Phase
from duoserve.experts.copy_engine import Priority, ThreadedCopyEngine, Ticket
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.layout import ExpertId
from duoserve.experts.packing import pack_path
from duoserve.experts.slots import SlotPool
from duoserve.kernels import HostWork
from duoserve.models.opened import opened
from duoserve.scheduling.routing import Routing

SLOTS = 16
BURST = 24  # copies in a row; so many rates are measured on
SINGLES = 12  # copies one at a time, to see what waking takes
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)  # tokens of an expert
UNDER_READS = 6  # tokens that are decoded while experts are read


class Stopwatch:
    """A RoutingListener that notes when it was told of the first and the last layer of a pass, and wants scores."""

    def __init__(self, lookahead: int) -> None:
        self.lookahead = lookahead
        self.passes: list[list[float]] = []

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        self.passes.append([])

    def routed(self, routing: Routing) -> None:
        self.passes[-1].append(time.perf_counter())

    def spans(self) -> list[float]:
        """Of each pass since the last time, seconds from the first to the last layer."""
        passes, self.passes = self.passes, []
        return [told[-1] - told[0] for told in passes]


@dataclass
class Rates:
    """One round of measurements by name; see ``Probe.round``. Seconds."""

    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, *values: float) -> None:
        self.figures.setdefault(name, []).extend(values)

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])

    def medians(self) -> dict[str, float]:
        return {name: self.median(name) for name in self.figures}


class Probe:
    """The pack of ``model`` in ``cache`` and slots to read into; ``rates`` collects what is measured."""

    def __init__(self, model: str, cache: Path, threads: int, held: ExitStack) -> None:
        with opened(model) as found:
            self.layout = found.layout(found.config.dtype)
            path = pack_path(found.checkpoint, self.layout, cache)
            self._experts = [ExpertId(layer, e) for layer in found.config.moe_layers for e in range(found.config.num_experts)]
            self._dtype, size = found.config.dtype, (found.config.num_layers, found.config.num_experts)
        self.store = DiskStore(path, self.layout, *size, None)
        held.callback(self.store.close)
        self._pool = SlotPool(SLOTS, self.layout)
        self._engines = [held.enter_context(closing(ThreadedCopyEngine(self.store, self._pool, n))) for n in (1, threads)]
        self._random = random.Random(0)
        self._slot = 0
        for slot in range(SLOTS):
            self.store.read(self._any(), self._pool.row(slot))
        self.rates = Rates()

    def reads(self) -> None:
        """Reads one after another, by one thread and by all, and copies that a sleeping thread is woken for."""
        for name, engine in zip(("alone", "together"), self._engines, strict=True):
            self.rates.note(name, self._burst(engine))
        for _ in range(SINGLES):
            self._computed(1, 1)
            [ticket] = self._submit(self._engines[-1], 1)
            self._engines[-1].wait([ticket])
            now = time.perf_counter()
            assert ticket.started_at is not None and ticket.finished_at is not None
            self.rates.note("wake", ticket.started_at - ticket.issued_at)
            self.rates.note("read", ticket.finished_at - ticket.started_at)
            self.rates.note("notice", now - ticket.finished_at)

    def experts(self) -> None:
        """Experts in slots, for so many tokens each; and two in one launch."""
        for count in COUNTS:
            self.rates.note(f"expert {count}", *(self._computed(count, 1) for _ in range(3)))
        self.rates.note("two experts", *(self._computed(1, 2) for _ in range(9)))
        self.rates.note("one expert", *(self._computed(1, 1) for _ in range(9)))

    def computing_under_reads(self, resident: Cell, prompt: Sequence[int]) -> None:
        """Decode steps of a resident model, while one copy thread reads, and while all do."""
        for name, engine in zip(("one", "all"), self._engines, strict=True):
            with self._reading(engine) as tickets:
                begun = time.perf_counter()
                served = resident.serve(prompt, UNDER_READS)
                ended = time.perf_counter()
            done = [t for t in tickets if t.finished_at is not None and t.error is None and begun < t.finished_at < ended]
            self.rates.note(f"step under {name}", *served.itl_s)
            self.rates.note(f"read under {name}", (ended - begun) / max(1, len(done)))

    @contextmanager
    def _reading(self, engine: ThreadedCopyEngine) -> Iterator[list[Ticket]]:
        tickets = self._submit(engine, 4000)
        yield tickets
        for ticket in tickets:
            engine.cancel(ticket)
        while left := [ticket for ticket in tickets if not ticket.finished]:
            engine.wait(left)

    def _burst(self, engine: ThreadedCopyEngine) -> float:
        """Seconds for each of some copies in a row, from the end of the first."""
        left = tickets = self._submit(engine, BURST)
        while left:
            engine.wait(left)
            left = [ticket for ticket in left if not ticket.finished]
        ends = sorted(ticket.finished_at or 0.0 for ticket in tickets)
        return (ends[-1] - ends[3]) / (BURST - 4)

    def _submit(self, engine: ThreadedCopyEngine, count: int) -> list[Ticket]:
        return [engine.submit(self._any(), at % SLOTS, Priority.DEMAND) for at in range(count)]

    def _computed(self, count: int, experts: int) -> float:
        """Seconds of ``experts`` experts in slots that were not read lately, with ``count`` tokens each."""
        hidden, inner = self.layout.hidden, self._pool.weights.w2.inner
        x_TH = torch.ones(count, hidden, dtype=self._dtype)
        ids_TK = torch.arange(experts).repeat(count, 1)
        plan = kernels.route_plan(ids_TK, torch.full((8,), -1, dtype=torch.int32))
        act_NI, y_NH = x_TH.new_empty(ids_TK.numel(), inner), x_TH.new_empty(ids_TK.numel(), hidden)
        pairs = [(e, (self._slot + e) % SLOTS) for e in range(experts)]
        self._slot = (self._slot + experts) % SLOTS
        begun = time.perf_counter()
        work = HostWork.of(pairs)
        kernels.moe_up(x_TH, self._pool.weights, plan, work, act_NI)
        kernels.moe_down(act_NI, self._pool.weights, plan, work, y_NH)
        return time.perf_counter() - begun

    def _any(self) -> ExpertId:
        return self._random.choice(self._experts)
