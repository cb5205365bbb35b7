"""Predictors that say what a test wants them to, and routings for them to hear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from duoserve.config import Phase
from duoserve.scheduling.routing import Routing


def routed(layer: int, experts: Sequence[int]) -> Routing:
    """One token chose ``experts``."""
    ids_TK = np.array([experts], dtype=np.int64)
    return Routing(layer, np.zeros(1, dtype=np.int64), ids_TK, np.ones(ids_TK.shape, dtype=np.float32), {})


class Teller:
    """Says ``tell(layer)``: the chance of each expert."""

    name = "teller"
    lookahead = 0

    def __init__(self, tell: Callable[[int], np.ndarray], horizon: int = 1) -> None:
        self.tell = tell
        self.horizon = horizon
        self.heard: list[int] = []  # the layers, -1 where a pass begins

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        self.heard.append(-1)

    def observe(self, routing: Routing) -> None:
        self.heard.append(routing.layer)

    def predict(self, layer: int) -> np.ndarray:
        return self.tell(layer).astype(np.float32)


def certain(num_experts: int, experts: Sequence[int], chance: float = 0.95) -> np.ndarray:
    """``chance`` for these experts, nothing for the others."""
    chances_E = np.zeros(num_experts)
    chances_E[list(experts)] = chance
    return chances_E
