"""A cache without slots: it keeps books of what slots would hold under another ranking, or if no guesses were made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from duoserve.scheduling.eviction import Eviction, least_valued
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.ranking import Values


class Ghost:
    """Admits every miss of decode steps, and gives up experts as a Cache (spaces.py) of ``num_slots`` slots does.

    ``slots`` has by layer the experts that would be in slots, the least recently used first. Each comes with its seat,
    its number among the experts of all layers. Others may only read it.
    """

    def __init__(self, eviction: Eviction, shape: ModelShape, num_slots: int) -> None:
        self._eviction = eviction
        self._num_experts = shape.num_experts
        self._quotas = eviction.quotas(num_slots, shape)
        self.num_slots = self._free = num_slots
        self.slots: list[dict[int, int]] = [{} for _ in self._quotas]

    def become(self, slots: Iterable[Iterable[int]]) -> None:
        """Begins anew with these experts, by layer: those in slots once a prompt has gone through the real cache."""
        self.slots = [{expert: self._seat(layer, expert) for expert in here} for layer, here in enumerate(slots)]
        self._free = self.num_slots - sum(map(len, self.slots))

    def use(self, layer: int, experts: Sequence[int], values: Values) -> int:
        """A decode step's layer uses ``experts``; gives how many it misses. These replace those of least ``values``."""
        here = self.slots[layer]
        missing = [expert for expert in experts if expert not in here]
        if missing:
            self._admit(layer, missing, frozenset(experts), values)
        kept = [expert for expert in reversed(experts) if expert not in missing] if missing else reversed(experts)
        for expert in (*kept, *missing):
            if expert in here:
                here[expert] = here.pop(expert)  # what has just been copied is released last
        return len(missing)

    def _admit(self, layer: int, missing: Sequence[int], held: Collection[int], values: Values) -> None:
        """Puts missing experts into free slots, or in place of others than those that this layer has ``held``."""
        here, idle = self.slots[layer], [*self.slots]
        idle[layer] = {expert: seat for expert, seat in here.items() if expert not in held}
        for expert in missing:
            if self._free > 0 or self._give_up(layer, idle, values):
                self._free -= 1
                here[expert] = self._seat(layer, expert)

    def _give_up(self, loading: int, idle: Sequence[dict[int, int]], values: Values) -> bool:
        """Gives up an expert for a miss of the layer ``loading``; False if that layer holds all there are."""
        for layers in self._eviction.groups(loading, self.slots, self._quotas):
            seat = least_valued(layers, idle, values, ())
            if seat is not None:
                layer, expert = divmod(seat, self._num_experts)
                del self.slots[layer][expert]
                if layer == loading:
                    del idle[layer][expert]
                self._free += 1
                return True
        return False

    def _seat(self, layer: int, expert: int) -> int:
        return layer * self._num_experts + expert
