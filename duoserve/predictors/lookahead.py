"""Predicts by the next layer's router, applied to this layer's hidden state.

T rows, E experts, L MoE layers.
"""

from __future__ import annotations

import numpy as np

from duoserve.predictors.base import RowPredictor
from duoserve.predictors.features import margins
from duoserve.traces.trace import TraceMeta

LEAST_LOGIT = -80.0  # exp(89) overflows float32


class LookaheadPredictor(RowPredictor):
    """Turns a score's distance from the border of the top-k into a chance, by ``slopes_L`` and ``offsets_L``.

    For the first layer, which has no look-ahead scores, it uses ``popularity_LE``.
    """

    name = "lookahead"
    lookahead = 1

    def __init__(self, meta: TraceMeta, popularity_LE: np.ndarray, slopes_L: np.ndarray, offsets_L: np.ndarray) -> None:
        super().__init__(meta)
        self.popularity_LE, self.slopes_L, self.offsets_L = popularity_LE, slopes_L, offsets_L

    def chances(self, layer: int, distance: int) -> np.ndarray:
        place = self.history.place[layer]
        scores_TE = self.history.ahead.get(layer)
        if scores_TE is None:
            return np.tile(self.popularity_LE[place], (self.history.num_rows, 1))
        margins_TE = margins(scores_TE, self.meta.top_k)
        return logistic(self.slopes_L[place] * margins_TE + self.offsets_L[place])


def logistic(logits: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-x))``, with x no lower than LEAST_LOGIT."""
    chances: np.ndarray = 1 / (1 + np.exp(-np.maximum(logits, LEAST_LOGIT)))
    return chances
