"""The fewest experts that any cache would have to read for a routing that is known beforehand: Belady's, with bypass.

L layers, T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from duoserve.scheduling.cache_study import next_use

Routing = Sequence[Sequence[Sequence[int]]]


def least_misses(routing_LTK: Routing, num_slots: int, num_experts: int) -> dict[str, int]:
    """Misses of a request that follows one of the same routing: with even shares for the layers, and with none.

    ``per_layer`` is what a policy is held against that gives each layer its share of the slots; ``pooled`` is the bound
    of all policies.
    """
    share = num_slots // len(routing_LTK)
    return {
        "uses": sum(len(experts) for steps in routing_LTK for experts in steps),
        "per_layer": sum(_misses_of_second(steps, share) for steps in routing_LTK),
        "pooled": _misses_of_second(_in_turn(routing_LTK, num_experts), num_slots),
    }


def _in_turn(routing_LTK: Routing, num_experts: int) -> list[list[int]]:
    """All layers' steps in the order of a decode, an expert numbered within the model."""
    return [
        [layer * num_experts + expert for expert in experts]
        for step in zip(*routing_LTK, strict=True)
        for layer, experts in enumerate(step)
    ]


def _misses_of_second(steps: Sequence[Sequence[int]], num_slots: int) -> int:
    """Of ``steps`` played twice, the misses of the second time."""
    twice = [*steps, *steps]
    due: dict[int, int] = {}  # of the experts in slots: when they are used next
    misses = 0
    for number, (experts, later) in enumerate(zip(twice, next_use(twice), strict=True)):
        if number >= len(steps):
            misses += sum(expert not in due for expert in experts)
        due.update(zip(experts, later, strict=True))
        while len(due) > num_slots:
            del due[max(due, key=due.__getitem__)]
    return misses
