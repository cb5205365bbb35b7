"""Which expert to give up when a slot is needed: pure functions of plain data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass

from duoserve.experts.layout import ExpertId
from duoserve.scheduling.plan import BEFORE_FIRST, ModelShape
from duoserve.scheduling.ranking import Ranking, Values

# The experts of a layer that may be given up (READY, not held) and their slots, the least recently used first.
IdleExperts = Mapping[int, int]


def least_valued(
    layers: Iterable[int], idle: Sequence[IdleExperts], values: Values, spared: Collection[ExpertId]
) -> int | None:
    """The slot of the expert of ``layers`` that has the least value and is not ``spared``; None if there is none."""
    least: tuple[float, int] | None = None
    for layer in layers:
        here = idle[layer]
        experts = [expert for expert in here if ExpertId(layer, expert) not in spared] if spared else here
        if experts:
            expert = min(experts, key=values[layer].__getitem__)
            if least is None or values[layer][expert] < least[0]:
                least = values[layer][expert], here[expert]
    return None if least is None else least[1]


def layer_quotas(num_slots: int, num_layers: int, top_k: int) -> list[int]:
    """An even share of the slots for each layer, the remainder for the first ones.

    Where that is less than ``top_k``, as many layers as can have it get ``top_k``, and the others nothing: a layer
    with fewer slots than one token wants would lose each expert to the next before it is wanted again.
    """
    if num_slots < num_layers * top_k:
        return [top_k if layer < num_slots // top_k else 0 for layer in range(num_layers)]
    share, rest = divmod(num_slots, num_layers)
    return [share + (layer < rest) for layer in range(num_layers)]


@dataclass(frozen=True)
class Eviction:
    """How a victim is found: a fresh ``ranking(num_layers, num_experts)`` says what experts are worth.

    It must not lose to that of a ``rival`` if there is one: see guard.py.

    ``per_layer`` gives layers quotas: one that has filled its own replaces its own experts, and one that has not takes
    from those above theirs. A decode token visits the layers in a cycle, so that the experts used longest ago are those
    of the layer that comes next: ranked by recency over the whole model they would be given up just before they are
    needed.
    """

    ranking: Callable[[int, int], Ranking]
    per_layer: bool
    rival: Callable[[int, int], Ranking] | None = None

    def quotas(self, num_slots: int, shape: ModelShape) -> list[int]:
        """The slots that each layer of the model may fill before its own experts go first; 0 if they always do."""
        quotas = [0] * shape.depth
        if self.per_layer:
            shares = layer_quotas(num_slots, len(shape.layers), shape.top_k)
            for layer, share in zip(shape.layers, shares, strict=True):
                quotas[layer] = share
        return quotas

    def groups(self, loading: int, slots: Sequence[Sized], quotas: Sequence[int]) -> Iterable[Collection[int]]:
        """Layers to look for a victim in, the first group first, when ``loading`` (or BEFORE_FIRST) needs a slot.

        ``slots`` (those that it fills, copies under way included) and ``quotas`` are by layer.
        """
        if self.per_layer:
            if loading != BEFORE_FIRST and len(slots[loading]) >= quotas[loading]:
                yield (loading,)
            yield [layer for layer, filled in enumerate(slots) if len(filled) > quotas[layer]]
        yield range(len(slots))
