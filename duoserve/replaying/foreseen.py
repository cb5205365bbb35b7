"""The future of a trace, for the oracle: what comes next, and when an expert is used again.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duoserve.config import Phase
from duoserve.replaying.cache_study import NEVER, next_use, steps_of
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import RequestTrace


class Future:
    """Knows all steps of ``requests``, which are replayed in that order; is a Predictor, and makes a Ranking."""

    name = "the future"
    horizon = 3
    lookahead = 0

    def __init__(self, requests: Sequence[RequestTrace], layers: Sequence[int], num_experts: int) -> None:
        self._num_experts = num_experts
        self._layers = list(layers)
        self._experts = {
            layer: [step.experts for request in requests for step in steps_of(request, layer)] for layer in layers
        }
        self._step = -1
        self._routed = -1  # the layer that was routed last in this step

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """As in Predictor."""
        self._step += 1
        self._routed = -1

    def observe(self, routing: Routing) -> None:
        """As in Predictor."""
        self._routed = routing.layer

    def predict(self, layer: int) -> np.ndarray:
        """As in Predictor: 1 for each expert that will be chosen, 0 for the others."""
        chances_E = np.zeros(self._num_experts, dtype=np.float32)
        step = self._step + (layer <= self._routed)
        if step < len(self._experts[layer]):
            chances_E[self._experts[layer][step]] = 1.0
        return chances_E

    def ranking(self, num_layers: int, num_experts: int) -> Belady:
        """A Ranking by Belady's rule, which knows the same steps."""
        return Belady(num_layers, num_experts, self._experts)


class Belady:
    """A Ranking by the time of the next use, which is comparable between layers: a step uses them one by one.

    A miss that is not used again soon is admitted, but it is the next to go.
    """

    def __init__(self, num_layers: int, num_experts: int, experts: dict[int, list[list[int]]]) -> None:
        self.values = [[float(-NEVER)] * num_experts for _ in range(num_layers)]
        self._next = {layer: next_use(steps) for layer, steps in experts.items()}
        self._turns = {layer: turn / num_layers for turn, layer in enumerate(experts)}
        for layer, steps in experts.items():
            for step in range(len(steps) - 1, -1, -1):
                for expert in steps[step]:
                    self.values[layer][expert] = -step - self._turns[layer]
        self._step = -1

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking."""
        self._step += 1

    def resume(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking."""

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """As in Ranking; ``experts`` are those of the trace, in its order."""
        turn = self._turns[layer]
        for expert, later in zip(experts, self._next[layer][self._step], strict=True):
            self.values[layer][expert] = -later - turn
