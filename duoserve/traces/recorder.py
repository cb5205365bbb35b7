"""Records the routing of one request at a time.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

import numpy as np

from duoserve.config import Phase
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import LayerTrace, joined
from duoserve.traces.trace_file import in_half


class TraceRecorder:
    """A RoutingListener; ``take`` gives the routing since the last ``take``, scores and weights in half precision."""

    lookahead = 1

    def __init__(self) -> None:
        self._heard: dict[int, list[LayerTrace]] = {}
        self._ahead: dict[int, np.ndarray] = {}

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """Forgets look-ahead scores, as there are none for a pass's first layer."""
        self._ahead = {}

    def routed(self, routing: Routing) -> None:
        """Keeps the choice, together with the look-ahead scores that the layer before gave for it."""
        ahead_TE = self._ahead.get(routing.layer)
        scores_TE = None if ahead_TE is None else in_half(ahead_TE)
        said = LayerTrace(routing.topk_ids_TK, in_half(routing.topk_weights_TK), scores_TE)
        self._heard.setdefault(routing.layer, []).append(said)
        self._ahead = dict(routing.ahead)

    def take(self) -> dict[int, LayerTrace]:
        """Gives each layer's routing of all tokens in the order of the passes, and forgets it."""
        heard, self._heard = self._heard, {}
        return {layer: joined(heard.pop(layer)) for layer in list(heard)}
