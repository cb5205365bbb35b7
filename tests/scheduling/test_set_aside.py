"""A prefill that is set aside keeps its ring, and goes on whatever decode steps have done meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from duoserve.config import Phase
from duoserve.errors import IntegrityError
from duoserve.experts.layout import ExpertId
from tests.scheduling.rig import Rig

EVERY = list(range(8))


def compute(rig: Rig, layer: int, wanted: Sequence[int]) -> None:
    with rig.scheduler.acquire(layer, wanted) as lease:
        experts = [ready.expert for batch in lease for ready in batch]
    assert sorted(experts) == sorted(wanted)


def set_aside() -> tuple[Rig, frozenset[int]]:
    """Eight slots, of which four are a ring with the first experts of layer 1 in it or on their way."""
    rig = Rig("lru")
    rig.decode([[0, 1]] * 4)
    rig.scheduler.begin(Phase.PREFILL, 1000)
    compute(rig, 0, EVERY)
    rig.scheduler.set_aside()
    lent = frozenset(rig.scheduler._cache.lent)
    assert len(lent) == 4
    return rig, lent


def finish(rig: Rig, routing: Sequence[Sequence[int]]) -> None:
    rig.scheduler.resume()
    for layer, wanted in enumerate(routing, start=1):
        compute(rig, layer, wanted)
    rig.scheduler.end()
    rig.scheduler.check_integrity()


def test_decode_steps_replace_nothing_in_the_ring() -> None:
    rig, lent = set_aside()
    before = {slot: rig.table.expert_in(slot) for slot in lent}
    for first in range(0, 8, 2):
        rig.decode([[first, first + 1]] * 4)
    assert {slot: rig.table.expert_in(slot) for slot in lent} == before
    finish(rig, [EVERY] * 3)


def test_a_ring_whose_speculation_others_have_used_still_has_slots() -> None:
    rig, lent = set_aside()
    speculated = [rig.table.expert_in(slot) for slot in lent]
    assert all(expert is not None and expert.layer == 1 for expert in speculated)
    numbers = [expert.expert for expert in speculated if expert is not None]
    rig.decode([[0, 1], numbers, [0, 1], [0, 1]])
    others = [expert for expert in EVERY if expert not in numbers]
    finish(rig, [others] * 3)


def test_what_is_set_aside_can_be_ended() -> None:
    rig, _ = set_aside()
    with pytest.raises(IntegrityError, match="set aside had ended"):
        rig.scheduler.begin(Phase.PREFILL, 1)
    rig.scheduler.resume()
    rig.scheduler.end()
    rig.scheduler.check_integrity()
    assert not rig.scheduler._residency.under_way()
    rig.prefill()
    with pytest.raises(IntegrityError, match="none had been set aside"):
        rig.scheduler.resume()
    with pytest.raises(IntegrityError, match="only a prefill"):
        rig.scheduler.set_aside()


def test_what_is_set_aside_can_be_given_up_and_leaves_its_ring_to_decode_steps() -> None:
    rig, lent = set_aside()
    rig.scheduler.give_up_aside()
    assert not rig.scheduler._residency.under_way()
    assert lent <= {slot for slot, _ in rig.table.ready()} | set(rig.table.empty_slots())
    for first in range(0, 8, 2):
        rig.decode([[first, first + 1]] * 4)
    assert rig.resident() == {ExpertId(layer, expert) for layer in range(4) for expert in (6, 7)}
    rig.scheduler.check_integrity()
    rig.prefill()
    with pytest.raises(IntegrityError, match="none had been set aside"):
        rig.scheduler.give_up_aside()


@pytest.mark.parametrize("policy", ["on-demand", "layer-prefetch", "duoserve-paper", "duoserve"])
@pytest.mark.parametrize("slots", [3, 8, 32])
def test_every_policy_goes_on(policy: str, slots: int) -> None:
    rig = Rig(policy, slots=slots)
    rig.decode([[0, 1]] * 4)
    rig.scheduler.begin(Phase.PREFILL, 1000)
    for layer in range(4):
        compute(rig, layer, EVERY)
        if layer < 3:
            rig.scheduler.set_aside()
            rig.decode([[layer, 7 - layer]] * 4)
            rig.scheduler.resume()
    rig.scheduler.end()
    rig.scheduler.check_integrity()
