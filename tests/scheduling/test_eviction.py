"""Which expert is given up: on data, and through the scheduler on a cyclic trace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duoserve.config import Phase
from duoserve.scheduling.eviction import Eviction, least_recent
from duoserve.scheduling.policies import LAYER_LRU, get_policy
from tests.scheduling.rig import Rig

GLOBAL_LRU = Eviction(pick=least_recent, per_layer=False)


def test_least_recent_looks_at_all_layers() -> None:
    assert least_recent([{4: 7, 1: 9}, {}, {2: 3, 0: 8}]) == 2
    assert least_recent([{}, {}]) is None


def test_the_layer_above_its_quota_gives_first() -> None:
    idle = [{0: 1, 1: 2}, {2: 3, 3: 4, 4: 5}]
    assert LAYER_LRU.victim(idle, [2, 3], [2, 2]) == 2
    assert LAYER_LRU.victim(idle, [3, 2], [2, 2]) == 0


def test_any_layer_gives_when_those_above_their_quota_have_nothing_idle() -> None:
    assert LAYER_LRU.victim([{}, {5: 9, 6: 1}], [3, 2], [2, 2]) == 5
    assert LAYER_LRU.victim([{}, {}], [3, 2], [2, 2]) is None


@pytest.mark.parametrize(
    ("num_slots", "quotas"),
    [(16, [4, 4, 4, 4]), (18, [5, 5, 4, 4]), (8, [2, 2, 2, 2]), (7, [2, 2, 2, 0]), (4, [2, 2, 0, 0]), (1, [0] * 4)],
)
def test_quotas(num_slots: int, quotas: list[int]) -> None:
    assert LAYER_LRU.quotas(num_slots, num_layers=4, top_k=2) == quotas
    assert GLOBAL_LRU.quotas(num_slots, num_layers=4, top_k=2) == [0, 0, 0, 0]


@pytest.mark.parametrize("slots", [8, 14])
def test_quotas_keep_what_a_cycle_over_the_layers_would_lose(slots: int) -> None:
    """Every token wants the same 16 experts, more than there are slots: the one wanted next is the one used first."""
    hit_rates = []
    for eviction in (GLOBAL_LRU, LAYER_LRU):
        rig = Rig(replace(get_policy("lru"), eviction=eviction), layers=8, slots=slots)
        for _ in range(20):
            rig.decode([[1, 5]] * 8)
        hit_rates.append(rig.stats().hit_rate(Phase.DECODE))
    assert hit_rates[0] == 0.0
    assert hit_rates[1] is not None and hit_rates[1] > 0.65 * slots / 16


def test_a_layer_that_is_at_its_quota_replaces_its_own() -> None:
    rig = Rig(layers=2, slots=4)
    rig.decode([[0, 1], [0, 1]])
    rig.decode([[0, 1], []])  # now the experts of layer 1 are those not used for longest
    rig.decode([[2], []])
    assert rig.resident() == {(0, 0), (0, 2), (1, 0), (1, 1)}


def test_the_most_wanted_outlives_the_others() -> None:
    rig = Rig(layers=1, slots=3)
    rig.decode([[4, 6, 2]])
    rig.decode([[4, 6, 2]])
    rig.decode([[0]])
    assert {expert.expert for expert in rig.resident()} == {4, 6, 0}
