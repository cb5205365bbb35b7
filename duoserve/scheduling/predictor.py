"""What says which experts a coming layer will want.

T tokens, E experts.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from duoserve.config import Phase
from duoserve.scheduling.routing import Routing


class Predictor(Protocol):
    """Hears every layer of every pass in order, and may be asked at any time about what comes.

    ``horizon`` is how many MoE layers ahead it can be asked about (1 to 3), ``lookahead`` for how many of the next
    layers it reads look-ahead scores (0: none).
    """

    @property
    def name(self) -> str: ...

    @property
    def horizon(self) -> int: ...

    @property
    def lookahead(self) -> int: ...

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """A forward pass begins over rows of these requests (int64)."""

    def observe(self, routing: Routing) -> None:
        """A layer's router has spoken, in prefill or decode."""

    def predict(self, layer: int) -> np.ndarray:
        """Float32 [E]: the probability that any row of this step will choose the expert at ``layer``.

        ``layer`` is one of the next ``horizon`` MoE layers behind the last observed one. Behind the model's last layer
        comes its first, of the next step.
        """
        ...
