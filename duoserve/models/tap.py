"""The tap between a model's routers and a listener.

T tokens, K top-k, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from duoserve.config import Phase
from duoserve.scheduling.routing import Routing, RoutingListener

Logits = Callable[[Tensor], Tensor]  # from normed hidden states [T, H] to logits [T, E]


class RouterSite(NamedTuple):
    """The router of one layer, and the weight of the norm before it."""

    layer: int
    logits: Logits
    norm_H: Tensor


class _Ahead(NamedTuple):
    """A later layer's router; ``scale_H`` turns an earlier layer's normed input into one normed for this router."""

    layer: int
    logits: Logits
    scale_H: Tensor


@dataclass
class LatePass:
    """Keeps the choices of a pass that other passes may interrupt, but no look-ahead scores, which are too large."""

    phase: Phase
    requests_T: np.ndarray
    routings: list[Routing] = field(default_factory=list)


class RoutingTap:
    """Tells ``listener`` what the routers at ``sites`` (in the order of their layers) choose.

    Look-ahead scores are a later router's logits for this layer's hidden state, normed with the weight of the later
    layer's norm. They are products of their own, so that this layer's logits have the same bits without a listener.
    """

    def __init__(self, listener: RoutingListener, sites: Sequence[RouterSite]) -> None:
        self._listener = listener
        self._requests_T = np.empty(0, dtype=np.int64)
        self._late: LatePass | None = None
        self._ahead = {
            site.layer: [_look_ahead(site, later) for later in sites[at + 1 : at + 1 + listener.lookahead]]
            for at, site in enumerate(sites)
        }

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """To be called before a forward pass, whose row t is a token of request ``requests_T[t]`` (int64)."""
        self._requests_T = requests_T
        self._late = None
        self._listener.begin(phase, requests_T)

    def follow(self, late: LatePass) -> None:
        """Keeps the next choices, which are of a pass that others may interrupt, in ``late`` until ``deliver``."""
        self._late = late

    def deliver(self, late: LatePass) -> None:
        """Tells the listener of a whole pass, when it has ended."""
        self.begin(late.phase, late.requests_T)
        for routing in late.routings:
            self._listener.routed(routing)

    def routed(self, layer: int, x_TH: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor) -> None:
        """Takes the choice that the router of ``layer`` made from its input ``x_TH``."""
        late = self._late
        if late is not None:
            late.routings.append(Routing(layer, late.requests_T, _host(topk_ids_TK), _host(topk_weights_TK), {}))
            return
        ahead = {later: _host(scores_TE) for later, scores_TE in self.look_ahead(layer, x_TH).items()}
        self.routed_on_host(layer, _host(topk_ids_TK), _host(topk_weights_TK), ahead)

    def later(self, layer: int) -> list[int]:
        """The layers behind ``layer`` for which there are look-ahead scores."""
        return [ahead.layer for ahead in self._ahead[layer]]

    def look_ahead(self, layer: int, x_TH: Tensor) -> dict[int, Tensor]:
        """The look-ahead scores at ``layer`` by later layer: float32 [T, E], on the routers' device."""
        return {ahead.layer: ahead.logits(x_TH * ahead.scale_H).float() for ahead in self._ahead[layer]}

    def routed_on_host(
        self, layer: int, topk_ids_TK: np.ndarray, topk_weights_TK: np.ndarray, ahead: Mapping[int, np.ndarray]
    ) -> None:
        """As ``routed``, for a decode step's choice that is already on the host."""
        self._listener.routed(Routing(layer, self._requests_T, topk_ids_TK, topk_weights_TK, ahead))


def _look_ahead(site: RouterSite, later: RouterSite) -> _Ahead:
    """The router of ``later``, to be asked at ``site``.

    A weight of zero in the norm at ``site`` hides the hidden state, so the scale is zero there. It is zero too where a
    weight is so small that the norm's dtype cannot hold the scale.
    """
    scale_H = (later.norm_H.float() / site.norm_H.float()).to(site.norm_H.dtype)
    return _Ahead(later.layer, later.logits, torch.where(scale_H.isfinite(), scale_H, 0))


def _host(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array
