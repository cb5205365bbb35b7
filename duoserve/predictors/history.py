"""Follows what the rows of a step have chosen so far, and what their requests chose before.

T rows of a step, K top-k, E experts, L MoE layers, D decays, S requests that are remembered.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping

import numpy as np

from duoserve.config import Phase
from duoserve.predictors.features import DECAYS, spread
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import TraceMeta

PATH = 3  # layers whose choices are remembered in full
REMEMBERED = 64  # requests that are remembered; a request that comes back later begins anew


class History:
    """Follows the passes of a model. Layers are counted by their place among the MoE layers.

    ``path`` has the weights [T, E] of the last layers' choices, the newest first (zeros for a row without any), and
    ``whole_path_TE`` counts the choices of each row's present token over all layers so far. ``last`` is the place of
    the last observed layer (-1 before the first pass), and ``ahead`` has the look-ahead scores that it gave.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.place = {layer: place for place, layer in enumerate(meta.layers)}
        self.last = -1
        self.path: deque[np.ndarray] = deque(maxlen=PATH)
        self.whole_path_TE = np.zeros((0, meta.num_experts), dtype=np.float32)
        self.ahead: Mapping[int, np.ndarray] = {}
        self._requests_T = np.empty(0, dtype=np.int64)
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._slots_T = np.empty(0, dtype=np.int64)
        self._counts_SLDE = np.zeros((1, len(meta.layers), len(DECAYS), meta.num_experts), dtype=np.float32)
        self._totals_SLD1 = np.zeros((1, len(meta.layers), len(DECAYS), 1), dtype=np.float32)

    @property
    def num_rows(self) -> int:
        """Rows of the present step."""
        return len(self._requests_T)

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """To be called when a step begins. A prefill forgets its requests, as another replay may repeat numbers."""
        if phase is Phase.PREFILL:
            self._forget(set(requests_T.tolist()))
        if not np.array_equal(requests_T, self._requests_T):
            self._reorder(requests_T)
        self.ahead = {}

    def observe(self, routing: Routing) -> None:
        """Takes a layer's choice, which counts for the requests from now on."""
        place = self.place[routing.layer]
        ids_TK, weights_TK = routing.topk_ids_TK, routing.topk_weights_TK
        share_TK = weights_TK / np.maximum(weights_TK.sum(1, keepdims=True), 1e-9)
        self.path.appendleft(spread(ids_TK, share_TK, self.meta.num_experts))
        chosen_TE = self.path[0] > 0
        if place == 0 or len(self.whole_path_TE) != len(ids_TK):
            self.whole_path_TE = chosen_TE.astype(np.float32)
        else:
            self.whole_path_TE += chosen_TE
        self._count(place, ids_TK)
        self.last, self.ahead = place, routing.ahead
        if place == len(self.meta.layers) - 1 and len(set(self._slots_T.tolist())) < len(self._slots_T):
            self._keep_last_rows()

    def distance(self, layer: int) -> int:
        """How many MoE layers ``layer`` comes after the last observed one; in the next step if it lies before that."""
        return (self.place[layer] - self.last - 1) % len(self.meta.layers) + 1

    def counts(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Decayed counts of each row's request: [T, D, E] of its choices at ``layer``, and [T, D, 1] of its tokens."""
        place = self.place[layer]
        return self._counts_SLDE[self._slots_T, place], self._totals_SLD1[self._slots_T, place]

    def _count(self, place: int, ids_TK: np.ndarray) -> None:
        slots = self._slots_T
        if len(slots) == 1:
            self._counts_SLDE[slots[0], place] *= DECAYS[:, None]
            self._counts_SLDE[slots[0], place][:, ids_TK[0]] += 1
            self._totals_SLD1[slots[0], place] *= DECAYS[:, None]
            self._totals_SLD1[slots[0], place] += 1
            return
        for slot in set(slots.tolist()):
            rows = np.flatnonzero(slots == slot)
            chosen_TE = spread(ids_TK[rows], np.ones(1, dtype=np.float32), self.meta.num_experts)
            fading_DT = DECAYS[:, None] ** np.arange(len(rows) - 1, -1, -1, dtype=np.float32)
            faded_D1 = DECAYS[:, None] ** len(rows)
            self._counts_SLDE[slot, place] = faded_D1 * self._counts_SLDE[slot, place] + fading_DT @ chosen_TE
            self._totals_SLD1[slot, place] = faded_D1 * self._totals_SLD1[slot, place] + fading_DT.sum(1, keepdims=True)

    def _forget(self, numbers: set[int]) -> None:
        for slot in (self._slots[number] for number in numbers if number in self._slots):
            self._counts_SLDE[slot], self._totals_SLD1[slot] = 0, 0
        if not numbers.isdisjoint(self._requests_T.tolist()):
            self._requests_T = np.empty(0, dtype=np.int64)

    def _keep_last_rows(self) -> None:
        """Keeps the last row of each request, at the end of a prompt: the next step goes on from there."""
        self._reorder(np.array(list(dict.fromkeys(self._requests_T.tolist())), dtype=np.int64))

    def _reorder(self, requests_T: np.ndarray) -> None:
        """Makes a row for each of these requests, with the path of the last row that its request has had."""
        row_of = {number: row for row, number in enumerate(self._requests_T.tolist())}
        rows_T = np.array([row_of.get(number, -1) for number in requests_T.tolist()], dtype=np.int64)
        known_T1 = (rows_T >= 0)[:, None]
        self.path = deque((_taken(old_TE, rows_T, known_T1) for old_TE in self.path), maxlen=PATH)
        self.whole_path_TE = _taken(self.whole_path_TE, rows_T, known_T1)
        self._requests_T = requests_T
        numbers = requests_T.tolist()
        most = max(REMEMBERED, len(set(numbers)))  # a prompt has a row for each of its tokens
        self._slots_T = np.array([self._slot(number, most) for number in numbers], dtype=np.int64)

    def _slot(self, number: int, most: int) -> int:
        """The slot in which a request is remembered; beyond ``most`` requests the least recently seen is forgotten."""
        if number in self._slots:
            self._slots.move_to_end(number)
            return self._slots[number]
        slot = len(self._slots)
        if slot >= most:
            _, slot = self._slots.popitem(last=False)
        elif slot >= len(self._counts_SLDE):
            self._counts_SLDE = np.concatenate([self._counts_SLDE, np.zeros_like(self._counts_SLDE)])
            self._totals_SLD1 = np.concatenate([self._totals_SLD1, np.zeros_like(self._totals_SLD1)])
        self._counts_SLDE[slot], self._totals_SLD1[slot] = 0, 0
        self._slots[number] = slot
        return slot


def _taken(old_TE: np.ndarray, rows_T: np.ndarray, known_T1: np.ndarray) -> np.ndarray:
    if not len(old_TE):
        return np.zeros((len(rows_T), old_TE.shape[1]), dtype=np.float32)
    taken_TE: np.ndarray = old_TE[rows_T] * known_T1
    return taken_TE
