"""Which expert is given up: on data, and through the scheduler on a cyclic trace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.scheduling.eviction import Eviction, least_valued
from duoserve.scheduling.plan import BEFORE_FIRST, ModelShape
from duoserve.scheduling.policies import EVICTIONS, get_policy
from duoserve.scheduling.ranking import Recency
from tests.scheduling.rig import Rig

LAYER_LRU = EVICTIONS["lru"]
GLOBAL_LRU = Eviction(Recency, per_layer=False)
FOUR_LAYERS = ModelShape(num_experts=8, top_k=2, layers=(1, 2, 3, 4))
VALUES = [[3.0, 1.0, 2.0], [1.5, 1.0, 0.5]]


def groups(loading: int, filled: list[int], quotas: list[int]) -> list[list[int]]:
    return [list(layers) for layers in LAYER_LRU.groups(loading, [range(n) for n in filled], quotas)]


def test_the_least_valued_of_all_the_layers_goes() -> None:
    assert least_valued([0, 1], [{0: 7, 2: 8}, {0: 9}], VALUES, ()) == 9
    assert least_valued([0], [{0: 7, 2: 8}, {0: 9}], VALUES, ()) == 8
    assert least_valued([0, 1], [{}, {}], VALUES, ()) is None


def test_of_equals_the_least_recently_used_goes() -> None:
    assert least_valued([0, 1], [{1: 5}, {1: 6}], VALUES, ()) == 5
    assert least_valued([0], [{2: 4, 1: 5}], [[0.0] * 3], ()) == 4


def test_who_is_spared_stays() -> None:
    spared = {ExpertId(1, 0), ExpertId(1, 2)}
    assert least_valued([0, 1], [{0: 7, 2: 8}, {0: 9, 2: 3}], VALUES, spared) == 8
    assert least_valued([1], [{}, {0: 9, 2: 3}], VALUES, spared) is None


def test_a_layer_at_its_quota_gives_its_own_first() -> None:
    assert groups(1, [2, 3], [2, 2]) == [[1], [1], [0, 1]]
    assert groups(0, [2, 3], [2, 2]) == [[0], [1], [0, 1]]


def test_a_layer_below_its_quota_takes_from_those_above_theirs() -> None:
    assert groups(0, [1, 3], [2, 2]) == [[1], [0, 1]]
    assert groups(BEFORE_FIRST, [2, 2], [2, 2]) == [[], [0, 1]]


@pytest.mark.parametrize(
    ("num_slots", "quotas"),
    [(16, [4, 4, 4, 4]), (18, [5, 5, 4, 4]), (8, [2, 2, 2, 2]), (7, [2, 2, 2, 0]), (4, [2, 2, 0, 0]), (1, [0] * 4)],
)
def test_quotas(num_slots: int, quotas: list[int]) -> None:
    assert LAYER_LRU.quotas(num_slots, FOUR_LAYERS) == [0, *quotas]
    assert GLOBAL_LRU.quotas(num_slots, FOUR_LAYERS) == [0] * 5


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
