"""Hit rates of caches over a trace, layer by layer and without a clock: thousands of tokens a second.

Every layer has slots of its own and admits every miss, but for Belady's, which knows the future and admits only what
is used again before something that is in a slot. Prompts pass by the slots, as they do through a prefill's ring, but
the rankings hear of them. K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from duoserve.config import Phase
from duoserve.kernels import by_demand
from duoserve.scheduling.ranking import Ranking
from duoserve.traces.trace import RequestTrace, Trace

NEVER = 1 << 60


class Hits(NamedTuple):
    """Uses of experts in decode steps, and how many found them in slots."""

    uses: int
    hits: int

    @property
    def rate(self) -> float:
        """The share of the uses that found their expert in a slot; 0 if there was no use."""
        return self.hits / self.uses if self.uses else 0.0


class Step(NamedTuple):
    """One layer's part of a step: distinct experts as by_demand orders them, and how many tokens want each."""

    phase: Phase
    num_tokens: int
    experts: list[int]
    counts: list[int]


def steps_of(request: RequestTrace, layer: int) -> Iterator[Step]:
    """What ``layer`` is asked for in each step: first in that of the whole prompt, then in one for each later token."""
    return _steps(request.layers[layer].topk_ids_NK, request.num_prompt)


def _steps(ids_TK: np.ndarray, num_prompt: int) -> Iterator[Step]:
    yield prompt_step(ids_TK[:num_prompt])
    for experts in ids_TK[num_prompt:].tolist():
        yield Step(Phase.DECODE, 1, by_demand(dict.fromkeys(experts, 1)), [1] * len(experts))


def prompt_step(ids_TK: np.ndarray) -> Step:
    """The step of a prompt at one layer, where its tokens chose ``ids_TK``."""
    experts_E, counts_E = np.unique(ids_TK, return_counts=True)
    rows = dict(zip(experts_E.tolist(), counts_E.tolist(), strict=True))
    experts = by_demand(rows)
    return Step(Phase.PREFILL, len(ids_TK), experts, [rows[expert] for expert in experts])


def cached_hits(trace: Trace, num_slots: int, ranking: Callable[[int, int], Ranking], warm_up: int = 0) -> Hits:
    """Caches of ``num_slots`` slots for each layer; the first ``warm_up`` requests fill them and are not counted."""
    return _sum(
        layer_hits(_courses(trace, layer), num_slots, ranking(1, trace.meta.num_experts), warm_up)
        for layer in trace.meta.layers
    )


def belady_hits(trace: Trace, num_slots: int, warm_up: int = 0) -> Hits:
    """The most hits that any cache of that size can have: Belady's with bypass, over the decode steps."""
    return _sum(_belady_layer(_courses(trace, layer), num_slots, warm_up) for layer in trace.meta.layers)


def least_copies(trace: Trace, num_slots: int) -> int:
    """The fewest copies that decode steps can need with ``num_slots`` slots for all layers, under any policy.

    Belady's misses with bypass, request by request. Each may find the best experts in its slots when its steps begin:
    that saves no more than a copy for each slot.
    """
    misses = 0
    for request in trace:
        courses = [list(steps_of(request, layer))[1:] for layer in trace.meta.layers]
        in_turn = [
            (True, [at * trace.meta.num_experts + expert for expert in step.experts])
            for steps in zip(*courses, strict=True)
            for at, step in enumerate(steps)
        ]
        found = _belady(in_turn, num_slots)
        misses += max(0, found.uses - found.hits - num_slots)
    return misses


def _courses(trace: Trace, layer: int) -> list[list[Step]]:
    """The steps of each request; nothing is read but what was chosen at this layer, for there may be many."""
    ids_NK, starts, sizes = trace.chosen(layer), trace.starts_R.tolist(), trace.requests_R2.tolist()
    return [
        list(_steps(ids_NK[start : start + num_tokens], num_prompt))
        for start, (num_tokens, num_prompt) in zip(starts, sizes, strict=False)
    ]


def layer_hits(courses: Sequence[Iterable[Step]], num_slots: int, ranking: Ranking, warm_up: int) -> Hits:
    """One layer's cache over ``courses``, of which the first ``warm_up`` fill it and are not counted."""
    uses = hits = 0
    slots: dict[int, None] = {}  # the least recently used first
    for number, steps in enumerate(courses):
        for phase, num_tokens, experts, counts in steps:
            ranking.begin(phase, num_tokens)
            ranking.used(0, experts, counts)
            if phase is Phase.DECODE:
                found = _admit(slots, experts, num_slots, ranking.values[0])
                if number >= warm_up:
                    uses, hits = uses + len(experts), hits + found
    return Hits(uses, hits)


def _admit(slots: dict[int, None], experts: Sequence[int], num_slots: int, values: Sequence[float]) -> int:
    """Puts ``experts`` into ``slots``, for which the least valued others go; returns how many were there."""
    found = 0
    for expert in experts:
        if expert in slots:
            del slots[expert]
            found += 1
    while slots and len(slots) + len(experts) > num_slots:
        del slots[min(slots, key=values.__getitem__)]
    for expert in reversed(experts[:num_slots]):
        slots[expert] = None
    return found


def _belady_layer(courses: Sequence[Sequence[Step]], num_slots: int, warm_up: int) -> Hits:
    steps = [(number >= warm_up, step.experts) for number, course in enumerate(courses) for step in course[1:]]
    return _belady(steps, num_slots)


def _belady(steps: Sequence[tuple[bool, list[int]]], num_slots: int) -> Hits:
    """Belady's hits over ``steps``, each with whether it is counted."""
    next_uses = next_use([experts for _, experts in steps])
    due: dict[int, int] = {}  # of the experts in slots: when they are used next
    latest: list[tuple[int, int]] = []  # the same, the latest first, and what has been used since
    uses = hits = 0
    for (counts, experts), later in zip(steps, next_uses, strict=True):
        found = sum(expert in due for expert in experts)
        if counts:
            uses, hits = uses + len(experts), hits + found
        for expert, use in zip(experts, later, strict=True):
            due[expert] = use
            heappush(latest, (-use, expert))
        while len(due) > num_slots:
            use, expert = heappop(latest)
            if due.get(expert) == -use:
                del due[expert]
    return Hits(uses, hits)


def next_use(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """The number of the step that next uses each expert of each step, NEVER if none does."""
    coming: dict[int, int] = {}
    found: list[list[int]] = []
    for number in range(len(steps) - 1, -1, -1):
        found.append([coming.get(expert, NEVER) for expert in steps[number]])
        coming.update(dict.fromkeys(steps[number], number))
    return found[::-1]


def _sum(parts: Iterable[Hits]) -> Hits:
    uses, hits = zip(*parts, strict=True)
    return Hits(sum(uses), sum(hits))
