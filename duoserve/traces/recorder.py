"""Listens to one request at a time and keeps what it hears.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

import numpy as np

from duoserve.config import Phase
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import LayerTrace
from duoserve.traces.trace_file import in_half


class TraceRecorder:
    """A RoutingListener; ``take`` gives what was heard since the last time, scores and weights as the file has them."""

    lookahead = 1

    def __init__(self) -> None:
        self._heard: dict[int, list[LayerTrace]] = {}
        self._ahead: dict[int, np.ndarray] = {}

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """Nothing is known of the first layer ahead of it."""
        self._ahead = {}

    def routed(self, routing: Routing) -> None:
        """Keeps the choice beside the scores that the layer before gave."""
        ahead_TE = self._ahead.get(routing.layer)
        scores_TE = None if ahead_TE is None else in_half(ahead_TE)
        said = LayerTrace(routing.topk_ids_TK, in_half(routing.topk_weights_TK), scores_TE)
        self._heard.setdefault(routing.layer, []).append(said)
        self._ahead = dict(routing.ahead)

    def take(self) -> dict[int, LayerTrace]:
        """Each layer's routing of all tokens in the order of the passes, and forgets it."""
        heard, self._heard = self._heard, {}
        return {layer: _joined(heard.pop(layer)) for layer in list(heard)}


def _joined(said: list[LayerTrace]) -> LayerTrace:
    ids, weights = np.concatenate([s.topk_ids_NK for s in said]), np.concatenate([s.topk_weights_NK for s in said])
    scores = [s.ahead_NE for s in said if s.ahead_NE is not None]
    return LayerTrace(ids, weights, np.concatenate(scores) if scores else None)
