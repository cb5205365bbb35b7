"""duoserve's own predictor: a small network for each layer on look-ahead scores, path, affinity and popularity.

T rows, E experts, D decays, F direct features, X inputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from duoserve.predictors.base import RowPredictor
from duoserve.predictors.features import DECAYS, log_affinity, log_rates, margins, scaled
from duoserve.predictors.lookahead import logistic
from duoserve.traces.trace import TraceMeta

PATH_INPUTS = 2  # this many of the last layers' choices are inputs
DIRECT = 2 + len(DECAYS)


class LayerNetwork(NamedTuple):
    """A network that predicts one layer from a fixed number of layers before it.

    An expert's logit is the sum of its own features weighted by ``direct_FE``, of ``bias_E``, and of the output of two
    small layers over all inputs (``inner_XH``, ``inner_bias_H``, ``outer_HE``). ``scale_1`` is the typical margin of
    the look-ahead scores, ``affinity_EE`` how often an expert follows one of the last observed layer, ``prior_E`` how
    often it is chosen at all.
    """

    direct_FE: np.ndarray
    bias_E: np.ndarray
    inner_XH: np.ndarray
    inner_bias_H: np.ndarray
    outer_HE: np.ndarray
    scale_1: np.ndarray
    affinity_EE: np.ndarray
    prior_E: np.ndarray


class Seen(NamedTuple):
    """What a network may look at.

    ``path`` has the last layers' choices [T, E] by weight, the newest first; ``scores_TE`` are the look-ahead scores
    for the layer after the last observed one, if there are any. ``counts_TDE`` and ``totals_TD1`` are decayed counts of
    the request's choices and tokens.
    """

    path: Sequence[np.ndarray]
    scores_TE: np.ndarray | None
    counts_TDE: np.ndarray
    totals_TD1: np.ndarray


def inputs(seen: Seen, top_k: int, scale: float, affinity_EE: np.ndarray, prior_E: np.ndarray) -> np.ndarray:
    """The DIRECT features of every expert, then what was chosen on the path: [T, (DIRECT + PATH_INPUTS) * E]."""
    rates_TDE = log_rates(seen.counts_TDE, seen.totals_TD1, prior_E)
    zeros_TE = np.zeros((len(rates_TDE), len(prior_E)), dtype=np.float32)
    margins_TE = zeros_TE if seen.scores_TE is None else scaled(margins(seen.scores_TE, top_k), scale)
    path = [*seen.path[:PATH_INPUTS], *[zeros_TE] * (PATH_INPUTS - len(seen.path))]
    affinity_TE = log_affinity(path[0], affinity_EE, prior_E)
    return np.concatenate([margins_TE, affinity_TE, rates_TDE.reshape(len(rates_TDE), -1), *path], axis=1)


class LearnedPredictor(RowPredictor):
    """``networks`` maps (place of the layer among the MoE layers, layers ahead) to the network that predicts it."""

    name = "duoserve"
    lookahead = 1

    def __init__(self, meta: TraceMeta, networks: Mapping[tuple[int, int], LayerNetwork]) -> None:
        super().__init__(meta)
        self.networks = networks
        self.horizon = max(distance for _, distance in networks)

    def chances(self, layer: int, distance: int) -> np.ndarray:
        history = self.history
        network = self.networks[history.place[layer], distance]
        scores_TE = next(iter(history.ahead.values()), None)
        path = list(history.path)[:PATH_INPUTS]
        seen = Seen(path, scores_TE, *history.counts(layer))
        x_TX = inputs(seen, self.meta.top_k, float(network.scale_1[0]), network.affinity_EE, network.prior_E)
        return logistic(_logits(network, x_TX))


def _logits(network: LayerNetwork, x_TX: np.ndarray) -> np.ndarray:
    direct_FE = network.direct_FE
    direct_TFE = x_TX[:, : direct_FE.size].reshape(-1, *direct_FE.shape)
    hidden_TH = np.maximum(x_TX @ network.inner_XH + network.inner_bias_H, 0)
    logits_TE: np.ndarray = (direct_TFE * direct_FE).sum(1) + network.bias_E + hidden_TH @ network.outer_HE
    return logits_TE
