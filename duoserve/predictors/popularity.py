"""Predicts the experts that the request has chosen most often; at its start, those that all requests choose most.

T rows, E experts, L MoE layers.
"""

from __future__ import annotations

import numpy as np

from duoserve.predictors.base import RowPredictor
from duoserve.predictors.features import log_rates
from duoserve.traces.trace import TraceMeta

SLOWEST = -1  # the slowest decay, which covers the request as a whole


class PopularityPredictor(RowPredictor):
    """``popularity_LE`` is the share of all tokens that choose an expert."""

    name = "popularity"
    horizon = 3

    def __init__(self, meta: TraceMeta, popularity_LE: np.ndarray) -> None:
        super().__init__(meta)
        self.popularity_LE = popularity_LE

    def chances(self, layer: int, distance: int) -> np.ndarray:
        rates_TDE = log_rates(*self.history.counts(layer), self.popularity_LE[self.history.place[layer]])
        chances_TE: np.ndarray = np.minimum(np.exp(rates_TDE[:, SLOWEST]), 1)
        return chances_TE
