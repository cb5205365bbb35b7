"""Measures how good a predictor is on requests that it has not seen: it is asked before each layer of a decode step.

K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duoserve.config import Phase
from duoserve.errors import TraceError
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import Trace, TraceMeta

BINS = 10


@dataclass(frozen=True)
class Quality:
    """``ranks`` maps each layer to [steps, K]: the places of the chosen experts in the predicted order, from 0.

    ``calibration_error`` is the mean difference between predicted chances and the share that came true, over ten bins.
    """

    meta: TraceMeta
    ranks: dict[int, np.ndarray]
    calibration_error: float

    def recall(self, count: int, layer: int | None = None) -> float:
        """The share of the chosen experts among the ``count`` most likely ones, of one layer or over all."""
        return float((self._ranks(layer) < count).mean())

    def exact(self, layer: int | None = None) -> float:
        """The share of steps whose top-k experts are exactly the predicted ones."""
        return float((self._ranks(layer) < self.meta.top_k).all(1).mean())

    def at_least_half(self, layer: int | None = None) -> float:
        """The share of steps in which at least half of the top-k experts were predicted."""
        return float((2 * (self._ranks(layer) < self.meta.top_k).sum(1) >= self.meta.top_k).mean())

    def to_dict(self) -> dict[str, Any]:
        """All figures: recall at growing numbers of predicted experts, and each layer's own at top-k."""
        top_k, layers = self.meta.top_k, self.meta.layers
        counts = sorted({min(self.meta.num_experts, c) for c in (top_k, 3 * top_k // 2, 2 * top_k, 3 * top_k)})
        return {
            "steps": len(self.ranks[layers[0]]),
            "recall": {str(count): round(self.recall(count), 4) for count in counts},
            "exact": round(self.exact(), 4),
            "at_least_half": round(self.at_least_half(), 4),
            "calibration_error": round(self.calibration_error, 4),
            "recall_by_layer": {str(layer): round(self.recall(top_k, layer), 4) for layer in layers},
        }

    def _ranks(self, layer: int | None) -> np.ndarray:
        return self.ranks[layer] if layer is not None else np.concatenate(list(self.ranks.values()))


def measure(predictor: Predictor, trace: Trace, requests: Sequence[int]) -> Quality:
    """Runs through ``requests`` as an engine would, and compares each prediction with what was chosen.

    Raises TraceError if none of them has a decode step.
    """
    if not trace.decodes_R[list(requests)].any():
        raise TraceError(f"{len(requests)} requests are held out to measure on, and none decodes: trace more tokens")
    ranks: dict[int, list[np.ndarray]] = {layer: [] for layer in trace.meta.layers}
    said, came = np.zeros(BINS), np.zeros(BINS)
    for number in requests:
        request = trace[number]
        for step in range(request.num_steps):
            routings = list(request.routing(step))
            predictor.begin(Phase.DECODE if step else Phase.PREFILL, routings[0].requests_T)
            for routing in routings:
                if step:
                    chances_E = predictor.predict(routing.layer)
                    ranks[routing.layer].append(_ranks(chances_E, routing))
                    bins_E = np.minimum((chances_E * BINS).astype(np.int64), BINS - 1)
                    said += np.bincount(bins_E, chances_E, BINS)
                    came += np.bincount(bins_E[routing.topk_ids_TK[0]], minlength=BINS)
                predictor.observe(routing)
    total = sum(map(len, ranks.values())) * trace.meta.num_experts
    error = float(np.abs(said - came).sum() / max(1, total))
    return Quality(trace.meta, {layer: np.array(found) for layer, found in ranks.items()}, error)


def _ranks(chances_E: np.ndarray, routing: Routing) -> np.ndarray:
    order_E = np.argsort(-chances_E, kind="stable")
    rank_of_E = np.empty_like(order_E)
    rank_of_E[order_E] = np.arange(len(order_E))
    ranks_K: np.ndarray = rank_of_E[routing.topk_ids_TK[0]]
    return ranks_K
