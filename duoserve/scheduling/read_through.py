"""Decode steps that the device carries out by itself: where its misses may go, and what the books make of them.

L layers that have experts, T tokens, K top-k, E experts, X misses that a layer can have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from duoserve.config import Phase
from duoserve.errors import IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.metrics import Meter
from duoserve.scheduling.plan import BEFORE_FIRST, ModelShape
from duoserve.scheduling.residency import Residency
from duoserve.scheduling.spaces import Cache

# So much of the slots is kept EMPTY for the misses of a step. More slots hold fewer experts; with fewer, later layers
# overwrite what earlier ones have brought. Not measured yet.
SPARE_SHARE = 1 / 8


class Fill(NamedTuple):
    """A miss of a step: the device has brought ``expert`` into ``slot``; ``stayed`` unless a later layer took that."""

    expert: ExpertId
    slot: int
    stayed: bool


def most_misses(shape: ModelShape, num_tokens: int) -> int:
    """X: the slots that a layer must find free before a step."""
    return min(shape.num_experts, num_tokens * shape.top_k)


def lay_targets(spare: Sequence[int], num_layers: int, width: int) -> np.ndarray:
    """int32 [L, X]: the slots that the misses of each layer fill, in this order; X = ``width`` is at most len(spare).

    The layers' first choices are spread over the spare slots, so that as few as possible fall on one another.
    """
    first_L1 = np.arange(num_layers)[:, None] * len(spare) // num_layers
    targets_LX: np.ndarray = np.resize(np.asarray(spare, dtype=np.int32), 2 * len(spare))[first_L1 + np.arange(width)]
    return targets_LX


def fills(ready_LE: np.ndarray, chosen: Mapping[int, Iterable[int]], targets: Mapping[int, np.ndarray]) -> list[Fill]:
    """What the device did in a step that began with the table ``ready_LE``, layer by layer.

    Of the ``chosen`` experts of a layer those that were in no slot fill its ``targets``, in ascending order.
    """
    made = [
        (ExpertId(layer, expert), int(slot))
        for layer, experts in chosen.items()
        for expert, slot in zip(_missing(ready_LE[layer], experts), targets[layer], strict=False)
    ]
    last = {slot: expert for expert, slot in made}
    return [Fill(expert, slot, last[slot] == expert) for expert, slot in made]


def _missing(ready_E: np.ndarray, experts: Iterable[int]) -> Iterator[int]:
    return (expert for expert in sorted(experts) if ready_E[expert] < 0)


class ReadThrough:
    """The books of such steps: ``lay_out`` before each, ``took`` after it. The scheduler makes one for its passes."""

    def __init__(self, residency: Residency, cache: Cache, shape: ModelShape, meter: Meter) -> None:
        self._residency = residency
        self._cache = cache
        self._shape = shape
        self._meter = meter
        self._targets: dict[int, np.ndarray] = {}

    @property
    def ready_LE(self) -> np.ndarray:
        """int32 [layers of the model, E]: the slot of each READY expert, -1 for the others. A live view."""
        return self._residency.table.ready_LE

    def fits(self, num_tokens: int) -> bool:
        """Whether there are slots for all that a layer of such a step may miss, or for all experts."""
        num_slots = self._residency.table.num_slots
        return num_slots >= min(most_misses(self._shape, num_tokens), self._shape.total_experts)

    def lay_out(self, num_tokens: int) -> Mapping[int, np.ndarray]:
        """The slots, EMPTY now, that the misses of each layer fill in the coming step; experts are given up for them.

        IntegrityError where the step does not fit. No slot changes until ``took``.
        """
        self._residency.drain()
        layers, table = self._shape.layers, self._residency.table
        most = most_misses(self._shape, num_tokens)
        wished = max(most, min(int(SPARE_SHARE * table.num_slots), len(layers) * most))
        if table.num_slots < self._shape.total_experts:  # else whatever is absent finds a free slot
            for _ in range(wished - len(table.empty_slots())):
                self._cache.give_up(BEFORE_FIRST)
        spare = table.empty_slots()
        width = min(most, self._shape.total_experts - sum(self._residency.filled()))
        if len(spare) < width:
            raise IntegrityError(f"a step of {num_tokens} tokens may miss {width} experts; {len(spare)} slots are free")
        self._targets = dict(zip(layers, lay_targets(spare, len(layers), width), strict=True))
        return self._targets

    def took(self, chosen: Mapping[int, Sequence[int]]) -> None:
        """The step has been carried out; ``chosen`` has the experts of every layer, in order, most wanted first."""
        made = {fill.expert: fill for fill in fills(self.ready_LE, chosen, self._targets)}
        hits = {layer: self.ready_LE[layer].tolist() for layer in chosen}
        for layer, experts in chosen.items():
            for expert in (ExpertId(layer, number) for number in reversed(experts)):
                fill = made.get(expert)
                if fill is None:
                    self._residency.touch(expert, hits[layer][expert.expert])
                else:
                    self._residency.filled_by_device(expert, fill.slot if fill.stayed else None)
        num_chosen = sum(map(len, chosen.values()))
        self._meter.hit(Phase.DECODE, num_chosen - len(made))
        self._meter.miss(Phase.DECODE, len(made))
