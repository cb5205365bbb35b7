"""A scheduler over a virtual link, and a consumer that computes on the same clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool, SlotState
from duoserve.experts.tickets import Ticket, TicketState
from duoserve.experts.virtual import VirtualClock
from duoserve.metrics import Meter, Stats
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.scheduler import Scheduler
from tests.helpers.fakes import SMALL, ArrayStore
from tests.scheduling.fortune import routed
from tests.scheduling.recording import RecordingEngine

Routing = Sequence[Sequence[int]]  # by layer: the experts that are wanted, the most wanted first


class Batch(NamedTuple):
    """What a lease handed out, and when."""

    at: float
    layer: int
    experts: list[int]


class Rig:
    """Layers of ``experts`` each over ``slots`` slots; a copy takes ``copy_s``, unless a list says how long each."""

    def __init__(
        self,
        policy: str | Policy = "lru",
        *,
        layers: int = 4,
        experts: int = 8,
        top_k: int = 2,
        slots: int = 8,
        copy_s: float = 1.0,
        shuffle: int | None = None,
        store: ArrayStore | None = None,
        moe_layers: Sequence[int] | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self.meter = Meter(lambda: self.clock.now)
        self.store = store or ArrayStore(SMALL, layers, experts)
        pool = SlotPool(slots, SMALL, poison=True)
        rng = None if shuffle is None else random.Random(shuffle)
        self.engine = RecordingEngine(
            self.clock, lambda _: copy_s, self.store, pool, shuffle=rng, on_copied=self.meter.copied
        )
        self.pool = pool
        self.num_layers = layers
        self.num_experts = experts
        shape = ModelShape(experts, top_k, tuple(range(layers) if moe_layers is None else moe_layers))
        chosen = get_policy(policy) if isinstance(policy, str) else policy
        self.scheduler = Scheduler(shape, pool, self.engine, chosen, self.meter, predictor)
        self.table = self.scheduler.table

    def run(
        self,
        phase: Phase,
        routing: Routing,
        *,
        tokens: int = 1,
        attention_s: float = 0.0,
        expert_s: float = 0.0,
        look: Callable[[Batch], None] = lambda _: None,
    ) -> list[Batch]:
        """One forward pass; ``look`` is called with each batch before it is computed."""
        batches: list[Batch] = []
        with self.meter.compute():
            heard = self.scheduler.listener
            if heard is not None:
                heard.begin(phase, np.zeros(tokens, dtype=np.int64))
            self.scheduler.begin(phase, tokens)
            try:
                for layer, wanted in enumerate(routing):
                    self.clock.advance(attention_s)
                    with self.scheduler.acquire(layer, wanted) as lease:
                        if heard is not None and wanted:
                            heard.routed(routed(layer, wanted))
                            lease.prefetch()
                        for ready in lease:
                            batches.append(Batch(self.clock.now, layer, [one.expert for one in ready]))
                            look(batches[-1])
                            self.clock.advance(expert_s * len(ready))
            finally:
                self.scheduler.end()
        self.table.check_integrity()
        return batches

    def prefill(self, routing: Routing | None = None, *, tokens: int = 1000, **times: float) -> list[Batch]:
        """A long prompt, which wants every expert unless ``routing`` says otherwise."""
        every = [list(range(self.num_experts))] * self.num_layers
        return self.run(Phase.PREFILL, routing or every, tokens=tokens, **times)

    def decode(self, routing: Routing, **times: float) -> list[Batch]:
        """One token."""
        return self.run(Phase.DECODE, routing, **times)

    def resident(self) -> set[ExpertId]:
        """The experts that are READY."""
        return {expert for _, expert in self.table.ready()}

    def num_states(self, state: SlotState) -> int:
        """How many slots are in this state."""
        return sum(self.table.state(slot) is state for slot in range(self.table.num_slots))

    def num_holds(self) -> int:
        """Holds over all slots."""
        return sum(self.table.holds(slot) for slot in range(self.table.num_slots))

    def done(self) -> list[Ticket]:
        """The copies that were made, in the order in which they were finished."""
        made = [ticket for ticket in self.engine.tickets if ticket.state is TicketState.DONE]
        return sorted(made, key=lambda ticket: ticket.finished_at or 0.0)

    def stats(self) -> Stats:
        return self.meter.snapshot()
