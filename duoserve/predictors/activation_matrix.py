"""MoE-Infinity's predictor: the stored request most like the present one says what comes (Xue et al., 2024).

M stored requests, T rows, E experts, L MoE layers.
"""

from __future__ import annotations

import numpy as np

from duoserve.config import Phase
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.history import REMEMBERED
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import TraceMeta


class ActivationMatrixPredictor(RowPredictor):
    """``matrices_MLE`` has, for each stored request, the share of its tokens that chose each expert.

    The present request's matrix is matched by cosine; its dot products with the stored ones are updated as it grows.
    """

    name = "activation-matrix"
    horizon = 3

    def __init__(self, meta: TraceMeta, matrices_MLE: np.ndarray) -> None:
        super().__init__(meta)
        self.matrices_MLE = matrices_MLE
        norms_M = np.sqrt(np.einsum("mle,mle->m", matrices_MLE, matrices_MLE))
        self._directions_LEM = np.ascontiguousarray((matrices_MLE / norms_M[:, None, None]).transpose(1, 2, 0))
        self._likeness: dict[int, np.ndarray] = {}
        self._requests: list[int] = []

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        super().begin(phase, requests_T)
        self._requests = requests_T.tolist()
        for number in self._requests:
            likeness_M = self._likeness.pop(number, None)  # put back at the end, so that the oldest come first
            if likeness_M is None or phase is Phase.PREFILL:
                likeness_M = np.zeros(len(self.matrices_MLE), dtype=np.float32)
            self._likeness[number] = likeness_M
        while len(self._likeness) > max(REMEMBERED, len(self._requests)):
            del self._likeness[next(iter(self._likeness))]

    def observe(self, routing: Routing) -> None:
        super().observe(routing)
        direction_EM = self._directions_LEM[self.history.place[routing.layer]]
        for number, ids_K in zip(self._requests, routing.topk_ids_TK, strict=True):
            self._likeness[number] += direction_EM[ids_K].sum(0)

    def chances(self, layer: int, distance: int) -> np.ndarray:
        """See RowPredictor. The length of the present matrix is left out: it is the same for all candidates."""
        place = self.history.place[layer]
        best = [int(self._likeness[number].argmax()) for number in dict.fromkeys(self._requests)]
        return self.matrices_MLE[best, place]
