"""Which expert to give up when a slot is needed: pure functions of plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

# The slots of a layer that may be given up (READY, not held) and when each was last used, the longest ago first. Uses
# are counted over the whole model.
IdleSlots = Mapping[int, int]


def least_recent(layers: Iterable[IdleSlots]) -> int | None:
    """LRU: the slot whose last use is longest ago, None if there is none; O(layers)."""
    oldest = [next(iter(idle.items())) for idle in layers if idle]
    return min(oldest, key=itemgetter(1))[0] if oldest else None


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
    """How a victim is found: ``pick`` chooses among the idle slots of some layers.

    ``per_layer`` gives layers quotas, and those above theirs lose a slot first. A decode token visits the layers in a
    cycle, so that the experts used longest ago are those of the layer that comes next: ranked by recency over the
    whole model they would be given up just before they are needed.
    """

    pick: Callable[[Iterable[IdleSlots]], int | None]
    per_layer: bool

    def quotas(self, num_slots: int, num_layers: int, top_k: int) -> list[int]:
        """By layer, how many slots it may fill before its own are given up first; 0 where that is always so."""
        return layer_quotas(num_slots, num_layers, top_k) if self.per_layer else [0] * num_layers

    def victim(self, idle: Sequence[IdleSlots], filled: Sequence[int], quotas: Sequence[int]) -> int | None:
        """The slot to give up, None if none may be.

        ``idle``, ``filled`` (how many slots the layer fills, that of the coming copy included) and ``quotas`` are by
        layer.
        """
        above = [slots for slots, count, quota in zip(idle, filled, quotas, strict=True) if count > quota]
        slot = self.pick(above)
        return self.pick(idle) if slot is None else slot
