"""What the routers said, and the listeners that are told.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from duoserve.config import Phase


class Routing(NamedTuple):
    """What one layer's router said for the tokens of a step.

    ``layer`` is the model's layer number. ``requests_T`` (int64) has each row's request, ``topk_ids_TK`` (int64) and
    ``topk_weights_TK`` (float32) what was chosen. ``ahead`` maps later MoE layers to float32 [T, E]: the logits that
    their routers give to this layer's hidden state; it is empty unless a listener wants them.
    """

    layer: int
    requests_T: np.ndarray
    topk_ids_TK: np.ndarray
    topk_weights_TK: np.ndarray
    ahead: Mapping[int, np.ndarray]


class RoutingListener(Protocol):
    """Hears of every layer's routing, behind the layer's demands and before the next layer's.

    ``lookahead`` says for how many of the next MoE layers it wants scores; 0 is none.
    """

    @property
    def lookahead(self) -> int: ...

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """A forward pass begins over rows of these requests (int64)."""

    def routed(self, routing: Routing) -> None:
        """A layer's router has spoken."""


class Audience(RoutingListener):
    """Several listeners as one."""

    def __init__(self, listeners: Sequence[RoutingListener]) -> None:
        self._listeners = listeners

    @property
    def lookahead(self) -> int:
        """The most layers ahead that any of them wants."""
        return max(listener.lookahead for listener in self._listeners)

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """As in RoutingListener, one after the other."""
        for listener in self._listeners:
            listener.begin(phase, requests_T)

    def routed(self, routing: Routing) -> None:
        """As in RoutingListener, one after the other."""
        for listener in self._listeners:
            listener.routed(routing)


def audience(*listeners: RoutingListener | None) -> RoutingListener | None:
    """The listeners that are there, as one; None if none is."""
    present = [listener for listener in listeners if listener is not None]
    return present[0] if len(present) == 1 else Audience(present) if present else None
