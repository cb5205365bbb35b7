"""The next layer's router on today's hidden state.

T rows, E experts, L MoE layers.
"""

from __future__ import annotations

import numpy as np

from duoserve.predictors.base import RowPredictor
from duoserve.predictors.features import margins
from duoserve.traces.trace import TraceMeta

LEAST_LOGIT = -80.0  # float32 has no exp of 89


class LookaheadPredictor(RowPredictor):
    """A score's distance from the border of the top-k becomes a chance by ``slopes_L`` and ``offsets_L``.

    Of the first layer, which nothing looks ahead to, it knows ``popularity_LE`` only.
    """

    name = "lookahead"
    lookahead = 1

    def __init__(self, meta: TraceMeta, popularity_LE: np.ndarray, slopes_L: np.ndarray, offsets_L: np.ndarray) -> None:
        super().__init__(meta)
        self.popularity_LE, self.slopes_L, self.offsets_L = popularity_LE, slopes_L, offsets_L

    def chances(self, layer: int, distance: int) -> np.ndarray:
        """See RowPredictor."""
        place = self.history.place[layer]
        scores_TE = self.history.ahead.get(layer)
        if scores_TE is None:
            return np.tile(self.popularity_LE[place], (self.history.num_rows, 1))
        margins_TE = margins(scores_TE, self.meta.top_k)
        return logistic(self.slopes_L[place] * margins_TE + self.offsets_L[place])


def logistic(logits: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-x))``; no chance is below that of LEAST_LOGIT."""
    chances: np.ndarray = 1 / (1 + np.exp(-np.maximum(logits, LEAST_LOGIT)))
    return chances
