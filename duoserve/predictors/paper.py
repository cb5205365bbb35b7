"""The predictor of DuoServe-MoE (arXiv 2509.07379): a multi-layer perceptron on path, popularity and affinity.

T rows, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duoserve.predictors.base import RowPredictor
from duoserve.predictors.lookahead import logistic
from duoserve.traces.trace import TraceMeta


def paper_inputs(whole_path_TE: np.ndarray, popularity_E: np.ndarray, affinity_TE: np.ndarray) -> np.ndarray:
    """Inputs [T, 3E]: experts on the token's path, popularity, and affinity to the coming layer, each over its maximum.

    ``affinity_TE`` is the sum over the experts that the last layer chose.
    """
    popularity_TE = np.broadcast_to(popularity_E, whole_path_TE.shape)
    parts = (whole_path_TE, popularity_TE, affinity_TE)
    return np.concatenate([part / np.maximum(part.max(1, keepdims=True), 1e-9) for part in parts], axis=1)


class PaperPredictor(RowPredictor):
    """One perceptron with ``weights`` [in, out] and ``biases`` [out] predicts all MoE layers."""

    name = "paper"

    def __init__(
        self,
        meta: TraceMeta,
        popularity_LE: np.ndarray,
        affinity_LEE: np.ndarray,
        weights: Sequence[np.ndarray],
        biases: Sequence[np.ndarray],
    ) -> None:
        super().__init__(meta)
        self.popularity_LE, self.affinity_LEE = popularity_LE, affinity_LEE
        self.weights, self.biases = weights, biases

    def chances(self, layer: int, distance: int) -> np.ndarray:
        place = self.history.place[layer]
        if not self.history.path:
            return np.tile(self.popularity_LE[place], (self.history.num_rows, 1))
        affinity_TE = (self.history.path[0] > 0).astype(np.float32) @ self.affinity_LEE[place]
        x_TH = paper_inputs(self.history.whole_path_TE, self.popularity_LE[place], affinity_TE)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x_TH = np.maximum(x_TH @ weight + bias, 0)
        return logistic(x_TH @ self.weights[-1] + self.biases[-1])
