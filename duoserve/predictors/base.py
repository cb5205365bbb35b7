"""The base of the predictors: it follows the passes, and joins the chances of a step's rows.

T rows of a step, E experts.
"""

from __future__ import annotations

import numpy as np

from duoserve.config import Phase
from duoserve.errors import IntegrityError
from duoserve.predictors.features import any_row
from duoserve.predictors.history import History
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import TraceMeta


class RowPredictor(Predictor):
    """A predictor that judges each row by itself, in ``chances``. ``meta`` is the model whose routing it predicts.

    ``trained_on`` has the marks of the prompts that it has been trained on, for which it looks better than it is.
    """

    name = ""
    horizon = 1
    lookahead = 0

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.trained_on: frozenset[str] = frozenset()
        self.history = History(meta)

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        self.history.begin(phase, requests_T)

    def observe(self, routing: Routing) -> None:
        self.history.observe(routing)

    def predict(self, layer: int) -> np.ndarray:
        """See Predictor; raises IntegrityError for a layer beyond the horizon."""
        distance = self.history.distance(layer)
        if distance > self.horizon:
            raise IntegrityError(f"{self.name} was asked {distance} layers ahead, its horizon is {self.horizon}")
        return any_row(self.chances(layer, distance))

    def chances(self, layer: int, distance: int) -> np.ndarray:
        """Float32 [T, E]: each row's chance to choose each expert of ``layer``, ``distance`` layers ahead."""
        raise NotImplementedError
