"""Hit rates of caches: by hand, against brute force, and against the figures that the synthetic traces stand for."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from duoserve.config import Phase
from duoserve.kernels import by_demand
from duoserve.replaying.cache_study import (
    NEVER,
    belady_hits,
    cached_hits,
    least_copies,
    next_use,
    prompt_step,
    steps_of,
)
from duoserve.scheduling.ranking import DecayedFrequency, Recency
from duoserve.traces.synthetic import CARDS, synthesize
from duoserve.traces.trace import MemoryRows, Trace
from tests.traces.drawn import drawn_trace, trace_of


def test_a_prompts_experts_come_most_wanted_first() -> None:
    step = prompt_step(np.array([[3, 1], [3, 2], [3, 2]]))
    assert step == (Phase.PREFILL, 3, [3, 2, 1], [3, 2, 1])


def test_a_tokens_experts_come_as_a_model_asks_for_them() -> None:
    [_, step] = steps_of(trace_of([(1, [[2, 0], [3, 1]])])[0], 0)
    assert step == (Phase.DECODE, 1, by_demand({3: 1, 1: 1}), [1, 1])


def test_lru_by_hand() -> None:
    trace = trace_of([(1, [[7], [0], [1], [0], [2], [1], [0], [2]])])
    assert cached_hits(trace, 2, Recency) == (7, 1)  # what the prompt uses is not kept
    assert cached_hits(trace, 3, Recency) == (7, 4)


def test_every_layer_has_slots_of_its_own() -> None:
    trace = trace_of([(1, [[7], [0], [0], [1], [0]])], layers=3)
    assert cached_hits(trace, 1, Recency) == (12, 3)


def test_the_warm_up_is_not_counted() -> None:
    trace = trace_of([(1, [[7], [0], [1]]), (1, [[7], [0], [1]])])
    assert cached_hits(trace, 2, Recency) == (4, 2)
    assert cached_hits(trace, 2, Recency, warm_up=1) == (2, 2)
    assert belady_hits(trace, 2, warm_up=1) == (2, 2)


def test_next_use() -> None:
    assert next_use([[0, 1], [1], [0]]) == [[2, 1], [NEVER], [NEVER]]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_beats_belady(seed: int) -> None:
    """All courses of a cache of two slots that may be filled with anything it has seen, tried one by one."""
    rng = np.random.default_rng(seed)
    course = [sorted(rng.choice(5, 2, replace=False).tolist()) for _ in range(9)]

    @cache
    def best(step: int, slots: frozenset[int]) -> int:
        if step == len(course):
            return 0
        seen = slots | set(course[step])
        keeps = [frozenset(kept) for size in range(3) for kept in combinations(sorted(seen), size)]
        return len(slots & set(course[step])) + max(best(step + 1, kept) for kept in keeps)

    assert belady_hits(trace_of([(1, [[0, 1], *course])]), 2) == (18, best(0, frozenset()))


@pytest.mark.parametrize(
    ("share", "at_least", "belady"), [(0.125, 0.674, 0.781), (0.25, 0.84, 0.911), (0.5, 0.94, 0.98)]
)
def test_decayed_frequency_reaches_the_best_published_hit_rates(share: float, at_least: float, belady: float) -> None:
    card = dataclasses.replace(CARDS["qwen3-30b-a3b"], num_layers=4)
    trace = synthesize(card, requests=5, tokens=192, precision=0.8, seed=11, prompt=64)
    slots = int(share * card.num_experts)
    ours, lru = (cached_hits(trace, slots, kind, warm_up=1).rate for kind in (DecayedFrequency, Recency))
    best = belady_hits(trace, slots, warm_up=1).rate
    assert best == pytest.approx(belady, abs=0.03)
    assert best > ours >= at_least and ours > lru


class CountedRows(MemoryRows):
    """Knows how many bytes were read."""

    nbytes = 0

    def read(self, name: str, start: int, stop: int | None) -> np.ndarray:
        read = super().read(name, start, stop)
        CountedRows.nbytes += read.nbytes
        return read


def test_a_layer_after_the_other_is_no_reason_to_read_all_layers_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = drawn_trace()
    monkeypatch.setattr(CountedRows, "nbytes", 0)
    again = Trace(trace.meta, CountedRows({name: trace.read(name) for name in trace.meta.columns()}))
    assert belady_hits(again, 4) == belady_hits(trace, 4)
    assert CountedRows.nbytes <= sum(trace.read(name).nbytes for name in trace.meta.columns())


def test_least_copies_by_hand() -> None:
    """Two layers take turns, one slot: of each step it can save one copy, and before the first it may be filled."""
    trace = trace_of([(1, [[0, 1], [0, 1], [0, 1], [0, 1]])], layers=2)
    assert [least_copies(trace, slots) for slots in (1, 2, 3, 4)] == [3 * 4 - 3, 3 * 4 - 6, 3, 0]
    assert least_copies(trace_of([(1, [[0, 1], [0, 1], [0, 1], [0, 1]])] * 2, layers=2), 1) == 2 * 9


@pytest.mark.parametrize("slots", [8, 16, 32])
def test_no_cache_copies_less(slots: int) -> None:
    trace = drawn_trace()
    bound = least_copies(trace, slots)
    for per_layer in (belady_hits(trace, slots // len(trace.meta.layers)), cached_hits(trace, slots // 6, Recency)):
        assert 0 < bound <= per_layer.uses - per_layer.hits
