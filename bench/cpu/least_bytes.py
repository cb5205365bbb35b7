"""The experts that Belady's cache, with bypass, would have to read for a routing that is known beforehand.

L layers, T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from duoserve.replaying.cache_study import next_use

Routing = Sequence[Sequence[Sequence[int]]]


def least_misses(routing_LTK: Routing, num_slots: int, num_experts: int) -> dict[str, int]:
    """Misses of a request that follows one of the same routing, and its uses.

    ``per_layer``: each layer has its share of the slots, as our policies give it; ``pooled``: all share all.
    """
    shares, in_turn = _even_shares(num_slots, len(routing_LTK)), _in_turn(routing_LTK, num_experts)
    return {
        "uses": sum(len(experts) for steps in routing_LTK for experts in steps),
        "per_layer": sum(
            belady_misses([*steps, *steps], share, len(steps)) for steps, share in zip(routing_LTK, shares, strict=True)
        ),
        "pooled": belady_misses([*in_turn, *in_turn], num_slots, len(in_turn)),
    }


def _even_shares(num_slots: int, num_layers: int) -> list[int]:
    """Of each layer; the first have one more where the slots do not divide."""
    return [num_slots // num_layers + (layer < num_slots % num_layers) for layer in range(num_layers)]


def _in_turn(routing_LTK: Routing, num_experts: int) -> list[list[int]]:
    """All layers' steps in the order of a decode, an expert numbered within the model."""
    return [
        [layer * num_experts + expert for expert in experts]
        for step in zip(*routing_LTK, strict=True)
        for layer, experts in enumerate(step)
    ]


def belady_misses(steps: Sequence[Sequence[int]], num_slots: int, uncounted: int = 0) -> int:
    """Misses of the best cache of that size, of which those of the first ``uncounted`` steps are not in the number."""
    due: dict[int, int] = {}  # of the experts in slots: when they are used next
    misses = 0
    for number, (experts, later) in enumerate(zip(steps, next_use(steps), strict=True)):
        if number >= uncounted:
            misses += sum(expert not in due for expert in experts)
        due.update(zip(experts, later, strict=True))
        while len(due) > num_slots:
            del due[max(due, key=due.__getitem__)]
    return misses
