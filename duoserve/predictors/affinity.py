"""Predicts the experts that followed the last layer's choice in the traces.

T rows, E experts, L MoE layers.
"""

from __future__ import annotations

import numpy as np

from duoserve.predictors.base import RowPredictor
from duoserve.predictors.features import log_affinity
from duoserve.traces.trace import TraceMeta


class AffinityPredictor(RowPredictor):
    """``affinity_LEE[l, i, j]`` is how often j is chosen at place ``l`` when i was chosen at the place before."""

    name = "affinity"

    def __init__(self, meta: TraceMeta, popularity_LE: np.ndarray, affinity_LEE: np.ndarray) -> None:
        super().__init__(meta)
        self.popularity_LE, self.affinity_LEE = popularity_LE, affinity_LEE

    def chances(self, layer: int, distance: int) -> np.ndarray:
        place = self.history.place[layer]
        if not self.history.path:
            return np.tile(self.popularity_LE[place], (self.history.num_rows, 1))
        logs_TE = log_affinity(self.history.path[0], self.affinity_LEE[place], self.popularity_LE[place])
        chances_TE: np.ndarray = np.minimum(np.exp(logs_TE), 1)
        return chances_TE
