"""Scores what a predictor says while it is used.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duoserve.config import Phase
from duoserve.scheduling.foresight import best_experts
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import Routing


@dataclass
class Score:
    """How many of a decoded token's experts were among the predictor's k likeliest ones, counted layer by layer."""

    layers: int = 0  # how often a layer was predicted
    chosen: int = 0  # experts that were chosen there
    found: int = 0  # and had been among the k likeliest
    exact: int = 0  # layers of which all were
    half: int = 0  # layers of which at least half were

    @property
    def recall(self) -> float | None:
        """Recall@k; None where nothing was predicted."""
        return self.found / self.chosen if self.chosen else None

    @property
    def exact_share(self) -> float | None:
        """The share of layers whose top-k was exactly right; None where nothing was predicted."""
        return self.exact / self.layers if self.layers else None

    @property
    def half_share(self) -> float | None:
        """The share of layers whose top-k was at least half right; None where nothing was predicted."""
        return self.half / self.layers if self.layers else None

    def note(self, said: list[int], chosen: list[int]) -> None:
        """``said`` were the likeliest experts of a layer, ``chosen`` is what its router chose."""
        found = len(set(said).intersection(chosen))
        self.layers += 1
        self.chosen += len(chosen)
        self.found += found
        self.exact += found == len(chosen)
        self.half += 2 * found >= len(chosen)


class ScoredPredictor(Predictor):
    """Passes everything on to ``inner`` and keeps ``score`` of what it says about the very next layer."""

    def __init__(self, inner: Predictor) -> None:
        self._inner = inner
        self._said: dict[int, np.ndarray] = {}  # by layer: the last word before it was routed
        self._phase = Phase.PREFILL
        self.score = Score()

    @property
    def name(self) -> str:
        """The inner predictor's name."""
        return self._inner.name

    @property
    def horizon(self) -> int:
        """The inner predictor's horizon."""
        return self._inner.horizon

    @property
    def lookahead(self) -> int:
        """The inner predictor's lookahead."""
        return self._inner.lookahead

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        self._phase = phase
        if phase is Phase.PREFILL:
            self._said.clear()
        self._inner.begin(phase, requests_T)

    def observe(self, routing: Routing) -> None:
        said_E = self._said.pop(routing.layer, None)
        if said_E is not None and self._phase is Phase.DECODE and len(routing.topk_ids_TK) == 1:
            chosen = routing.topk_ids_TK[0].tolist()
            self.score.note(best_experts(said_E, len(chosen)), chosen)
        self._inner.observe(routing)

    def predict(self, layer: int) -> np.ndarray:
        said_E = self._said[layer] = self._inner.predict(layer)
        return said_E
