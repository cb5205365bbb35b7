"""Caches without slots, and a ranking that must not lose to another."""

from __future__ import annotations

import random

import pytest

from duoserve.config import Phase
from duoserve.scheduling.ghost import Ghost
from duoserve.scheduling.guard import ALLOWED_MISSES, Guard
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import EVICTIONS, get_policy
from duoserve.scheduling.ranking import DecayedFrequency, Ranking, Recency
from tests.scheduling.rig import Rig

SHAPE = ModelShape(num_experts=8, top_k=2, layers=(0, 1))
Steps = list[list[list[int]]]  # by step, by layer: the experts


def favourites(rng: random.Random, steps: int) -> Steps:
    """Two experts in every third step and any in between: LRU lets them go."""
    return [[[0, 1] if step % 3 == 0 else rng.sample(range(2, 8), 2) for _ in SHAPE.layers] for step in range(steps)]


def wanderings(rng: random.Random, steps: int) -> Steps:
    """Experts for some steps and never again: what was often used is no use."""
    return [
        [[step // 12 % 8, rng.choice([e for e in range(8) if e != step // 12 % 8])] for _ in SHAPE.layers]
        for step in range(steps)
    ]


def ghost(num_slots: int) -> Ghost:
    return Ghost(EVICTIONS["lru"], SHAPE, num_slots)


def misses_of(ranking: Ranking, cache: Ghost, steps: Steps) -> int:
    misses = 0
    for step in steps:
        ranking.begin(Phase.DECODE, 1)
        for layer, experts in enumerate(step):
            ranking.used(layer, experts, [1, 1])
            misses += cache.use(layer, experts, ranking.values)
    return misses


def guard(num_slots: int) -> Guard:
    return Guard(DecayedFrequency(2, 8), Recency(2, 8), lambda: ghost(num_slots))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["lru", "lfru"])
def test_a_ghost_misses_what_the_real_cache_misses(name: str, seed: int) -> None:
    eviction, steps = EVICTIONS[name], favourites(random.Random(seed), 60)
    policy = get_policy("lru")
    rig = Rig(type(policy)("as it is", policy.prefill, policy.decode, eviction), layers=2, slots=7)
    for step in steps:
        rig.decode(step)
    cache = Ghost(eviction, SHAPE, 7)
    assert misses_of(eviction.ranking(2, 8), cache, steps) == rig.stats().misses["decode"]
    assert {(one.layer, one.expert) for one in rig.resident()} == {
        (layer, expert) for layer, here in enumerate(cache.slots) for expert in here
    }


def test_a_ghost_becomes_what_the_real_cache_has_become() -> None:
    cache = ghost(4)
    cache.become([[1, 2], [3]])
    assert cache.use(0, [1, 2], Recency(2, 8).values) == 0
    assert cache.use(1, [3, 4], Recency(2, 8).values) == 1
    assert [sorted(here) for here in cache.slots] == [[1, 2], [3, 4]]
    cache.use(0, [5, 6], Recency(2, 8).values)
    assert [sorted(here) for here in cache.slots] == [[5, 6], [3, 4]]


def test_what_is_held_is_not_given_up() -> None:
    cache = ghost(1)
    assert cache.use(0, [1, 2], Recency(2, 8).values) == 2
    assert list(cache.slots[0]) == [1]


def test_it_goes_by_the_rival_until_it_may_lose_a_miss() -> None:
    judged, rival = guard(8), Recency(2, 8)
    steps = wanderings(random.Random(1), 25)
    assert misses_of(judged, ghost(8), steps) == misses_of(rival, ghost(8), steps) < 1 / ALLOWED_MISSES


def test_in_the_end_it_is_as_good_as_its_own() -> None:
    late = favourites(random.Random(2), 100)
    misses = []
    for ranking in (guard(8), DecayedFrequency(2, 8), Recency(2, 8)):
        cache = ghost(8)
        misses_of(ranking, cache, favourites(random.Random(3), 400))
        misses.append(misses_of(ranking, cache, late))
    judged, own, rival = misses
    assert judged == own < 0.9 * rival


@pytest.mark.parametrize("seed", range(4))
def test_where_its_own_loses_it_loses_no_more_than_is_allowed(seed: int) -> None:
    steps = wanderings(random.Random(seed), 1500)
    judged, own, rival = (
        misses_of(ranking, ghost(8), steps) for ranking in (guard(8), DecayedFrequency(2, 8), Recency(2, 8))
    )
    assert own > 1.015 * rival
    assert judged <= 1.01 * rival


def test_only_duoserve_is_guarded() -> None:
    assert get_policy("duoserve").eviction.rival is Recency
    assert get_policy("lookahead").eviction.rival is None
