"""Listeners that tests of several floors share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from duoserve.config import Phase
from duoserve.scheduling.routing import Routing


@dataclass
class Heard:
    """Keeps all it hears: the passes, and the routings of each."""

    lookahead: int = 0
    begun: list[tuple[Phase, list[int]]] = field(default_factory=list)
    routings: list[list[Routing]] = field(default_factory=list)

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        self.begun.append((phase, requests_T.tolist()))
        self.routings.append([])

    def routed(self, routing: Routing) -> None:
        self.routings[-1].append(routing)


@dataclass
class Copying(Heard):
    """Keeps copies, for the arrays of a fake device on a CPU are the device's own memory."""

    def routed(self, routing: Routing) -> None:
        ahead = {layer: scores.copy() for layer, scores in routing.ahead.items()}
        super().routed(
            Routing(
                routing.layer, routing.requests_T, routing.topk_ids_TK.copy(), routing.topk_weights_TK.copy(), ahead
            )
        )
