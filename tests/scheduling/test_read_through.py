"""Steps that a device carries out by itself, played on a device made of a dictionary: the books agree with it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.config import Phase
from duoserve.errors import IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotState
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import EVICTIONS, get_policy
from duoserve.scheduling.read_through import Fill, fills, lay_targets, most_misses
from tests.scheduling.rig import Rig

LAYERS, NUM_EXPERTS = 3, 12


class FakeDevice:
    """Reads slots by the table it was given, and fills those it was told to."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.books = rig.scheduler.read_through()
        self.slots: dict[int, ExpertId] = {}  # what no scrub has been made of

    def step(self, chosen: Mapping[int, Sequence[int]], tokens: int) -> int:
        """Returns the hits."""
        self.rig.scheduler.begin(Phase.DECODE, tokens)
        targets_NX = self.books.lay_out(tokens)
        self.learn()
        assert all(self.rig.table.state(slot) is SlotState.EMPTY for slot in targets_NX.flatten().tolist())
        slots_LE, hits = self.books.slots_LE.copy(), 0
        self.books.catch_up()
        for (layer, experts), targets_X in zip(chosen.items(), targets_NX, strict=True):
            free = iter(targets_X.tolist())
            for number in sorted(experts):
                expert, slot = ExpertId(layer, number), slots_LE[layer, number]
                if slot < 0:
                    self.slots[next(free)] = expert
                else:
                    assert self.slots[slot] == expert, "a kernel read another expert, or NaN"
                    hits += 1
        most = max(map(len, chosen.values()))
        ids = [[[*experts, *experts[:1] * (most - len(experts))]] for experts in chosen.values()]
        self.books.took(np.array(ids))
        self.rig.scheduler.end()
        self.look()
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


@given(
    slots=st.one_of(st.integers(3, 12), st.integers(16, 36)),
    top_k=st.integers(1, 2),
    tokens=st.integers(1, 3),
    moe_layers=st.sampled_from([None, [1, 2]]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_the_books_agree_with_the_device(
    slots: int, top_k: int, tokens: int, moe_layers: list[int] | None, seed: int
) -> None:
    """Few slots, of which all may be spare, and many, of which more are than a layer needs."""
    rng = random.Random(seed)
    rig = Rig("lru", layers=LAYERS, experts=NUM_EXPERTS, top_k=top_k, slots=slots, moe_layers=moe_layers)
    device, width = FakeDevice(rig), min(NUM_EXPERTS, top_k * tokens)
    layers = moe_layers or list(range(LAYERS))
    for _ in range(30):
        chosen = {layer: rng.sample(range(NUM_EXPERTS), rng.randint(1, width)) for layer in layers}
        if slots < width:
            with pytest.raises(IntegrityError, match=f"may miss {width} experts; {slots} slots"):
                device.step(chosen, tokens)
            return
        if rng.random() < 0.3 and moe_layers is None:  # an ordinary step between them
            rig.run(Phase.DECODE, [chosen[layer] for layer in layers], tokens=tokens)
        before = rig.stats()
        hits = device.step(chosen, tokens)
        misses, after = sum(map(len, chosen.values())) - hits, rig.stats()
        assert after.hits["decode"] - before.hits["decode"] == hits
        assert after.misses["decode"] - before.misses["decode"] == misses
        assert after.bytes.demanded - before.bytes.demanded == misses * rig.store.layout.slot_bytes


def test_what_is_chosen_again_is_a_hit_and_the_longest_unused_goes_first() -> None:
    rig = Rig("lru", layers=1, experts=8, top_k=2, slots=4)
    device = FakeDevice(rig)
    for chosen in ([1, 0], [0, 2], [0, 3]):
        device.step({0: chosen}, tokens=1)
    assert (rig.stats().hits["decode"], rig.stats().misses["decode"]) == (2, 4)
    assert rig.resident() == {ExpertId(0, 0), ExpertId(0, 3), ExpertId(0, 2)}


def test_the_eviction_hears_what_a_step_has_used() -> None:
    seldom_used_first = replace(get_policy("duoserve"), eviction=EVICTIONS["lfru"])
    rig = Rig(seldom_used_first, layers=1, experts=8, top_k=2, slots=6)
    device = FakeDevice(rig)
    for chosen in ([0, 1], [0, 1], [0, 1], [2, 3], [4, 5], [6, 7]):
        device.step({0: chosen}, tokens=1)
    device.books.catch_up()
    assert {ExpertId(0, 0), ExpertId(0, 1)} <= rig.resident()


def test_a_step_keeps_an_eighth_of_the_slots_free() -> None:
    rig = Rig("lru", layers=2, experts=32, top_k=2, slots=40)
    device = FakeDevice(rig)
    for first in range(0, 32, 2):
        device.step({0: [first, first + 1], 1: [first, first + 1]}, tokens=1)
    rig.scheduler.begin(Phase.DECODE, 1)
    device.books.lay_out(1)
    assert rig.num_states(SlotState.EMPTY) == 4  # two layers of two misses each need no fifth


def test_where_all_experts_have_slots_none_is_given_up() -> None:
    rig = Rig("resident", layers=2, experts=4, top_k=2, slots=8)
    rig.scheduler.load_all()
    device = FakeDevice(rig)
    assert [device.step({0: [3, 1], 1: [0, 2]}, tokens=1) for _ in range(3)] == [4, 4, 4]
    assert len(rig.resident()) == 8 and device.books.fits(num_tokens=100)


def test_the_last_layer_to_fill_a_slot_has_it() -> None:
    ids_NBK, slots_NBK = np.array([[[3, 1]], [[2, 0]]]), np.array([[[-1, -1]], [[7, -1]]])
    assert fills([4, 6], ids_NBK, slots_NBK, targets_NX=np.array([[5, 6], [6, 5]])) == [
        Fill(ExpertId(4, 1), 5, True),
        Fill(ExpertId(4, 3), 6, False),
        Fill(ExpertId(6, 0), 6, True),
    ]


def test_first_choices_are_spread_and_no_layer_has_a_slot_twice() -> None:
    targets_LX = lay_targets([10, 11, 12, 13], num_layers=2, width=3)
    assert targets_LX.tolist() == [[10, 11, 12], [12, 13, 10]]
    assert lay_targets([4, 9], num_layers=3, width=2).tolist() == [[4, 9], [4, 9], [9, 4]]
    assert most_misses(ModelShape(8, 2, (0, 1)), 3) == 6 and most_misses(ModelShape(8, 2, (0, 1)), 9) == 8
