"""A device made of a dictionary that carries out decode steps by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotState
from tests.scheduling.fortune import routed
from tests.scheduling.rig import Rig


class FakeDevice:
    """Reads slots by the table it was given, and fills those it was told to; each miss takes ``miss_s``.

    Whoever listens is told behind each step, and ``gap_s`` later comes the next.
    """

    def __init__(self, rig: Rig, miss_s: float = 0.0, gap_s: float = 0.0) -> None:
        self.rig = rig
        self.miss_s, self.gap_s = miss_s, gap_s
        self.books = rig.scheduler.read_through()
        self.slots: dict[int, ExpertId] = {}  # what no scrub has been made of

    def step(self, chosen: Mapping[int, Sequence[int]], tokens: int) -> int:
        """Returns the hits."""
        heard = self.rig.scheduler.listener
        if heard is not None:
            heard.begin(Phase.DECODE, np.zeros(tokens, dtype=np.int64))
        self.rig.scheduler.begin(Phase.DECODE, tokens)
        targets_NX = self.books.lay_targets(tokens)
        assert self.rig.num_states(SlotState.LOADING) == 0, "something may come into a slot while the step runs"
        self.learn()
        assert all(self.rig.table.state(slot) is SlotState.EMPTY for slot in targets_NX.flatten().tolist())
        hits = self.run(chosen, targets_NX)
        most = max(map(len, chosen.values()))
        ids = [[[*experts, *experts[:1] * (most - len(experts))]] for experts in chosen.values()]
        self.books.took(np.array(ids))
        self.look()
        if heard is not None:
            for layer, experts in chosen.items():
                heard.routed(routed(layer, experts))
            self.books.guess()
        self.rig.scheduler.end()
        self.rig.clock.advance(self.gap_s)
        return hits

    def run(self, chosen: Mapping[int, Sequence[int]], targets_NX: np.ndarray) -> int:
        slots_LE, hits = self.books.slots_LE.copy(), 0
        self.books.catch_up()
        for (layer, experts), targets_X in zip(chosen.items(), targets_NX, strict=True):
            free = iter(targets_X.tolist())
            for number in sorted(experts):
                expert, slot = ExpertId(layer, number), slots_LE[layer, number]
                if slot < 0:
                    self.slots[next(free)] = expert
                    self.rig.clock.advance(self.miss_s)
                else:
                    assert self.slots[slot] == expert, "a kernel read another expert, or NaN"
                    hits += 1
        return hits

    def learn(self) -> None:
        """The slots as ordinary copies have left them; EMPTY ones are scrubbed."""
        self.slots = dict(self.rig.table.ready())

    def look(self) -> None:
        self.rig.table.check_integrity()
        assert self.rig.num_holds() == 0 and self.rig.num_states(SlotState.LOADING) == 0
        for slot, expert in self.rig.table.ready():
            assert self.slots[slot] == expert
        idle = [slot for slots in self.rig.scheduler._residency.idle for slot in slots.values()]
        assert sorted(idle) == [slot for slot, _ in self.rig.table.ready()]
