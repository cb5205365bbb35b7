"""The examples that predictors are trained on: the tokens of a trace, each with what was known before it.

N tokens of the chosen requests, laid end to end; K top-k, E experts, L MoE layers, D decays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from duoserve.predictors.features import DECAYS, spread
from duoserve.predictors.learned import PATH_INPUTS, Seen
from duoserve.traces.trace import LayerTrace, Trace


class Examples(NamedTuple):
    """Examples for one layer, some layers ahead: what was ``seen`` by then, and which experts were chosen (0 or 1)."""

    seen: Seen
    chosen_NE: np.ndarray


class Tokens:
    """All tokens of some requests of a trace. A prompt's tokens come one after the other, like all others."""

    def __init__(self, trace: Trace, requests: Sequence[int]) -> None:
        self.meta = trace.meta
        self._trace = trace
        spans = [(int(trace.starts_R[r]), int(trace.starts_R[r + 1])) for r in requests]
        self._rows = np.concatenate([np.arange(start, stop) for start, stop in spans])
        self._lengths = [stop - start for start, stop in spans]
        self._first = np.cumsum([0, *self._lengths[:-1]])
        self._longer = len(spans) - np.cumsum(np.bincount(self._lengths))  # [n]: requests of more than n tokens

    def __len__(self) -> int:
        return len(self._rows)

    def chosen(self, place: int) -> np.ndarray:
        """Which experts each token chose, 0 or 1, float32 [N, E]."""
        ids_NK = self._trace.chosen(self.meta.layers[place])[self._rows]
        return spread(ids_NK, np.ones(1, dtype=np.float32), self.meta.num_experts)

    def by_request(self, values_NE: np.ndarray) -> list[np.ndarray]:
        """``values_NE`` split into the rows of each request."""
        return np.split(values_NE, self._first[1:])

    def examples(self, place: int, distance: int) -> Examples:
        """The examples for the choice of the layer at ``place``, made ``distance`` layers ahead."""
        num_layers = len(self.meta.layers)
        observed, late = (place - distance) % num_layers, place < distance
        path = [self._weights_at(observed - back, late) for back in range(PATH_INPUTS)]
        scores_NE = None if observed == num_layers - 1 else self._layer(observed + 1).ahead_NE
        if scores_NE is not None:
            scores_NE = (self._a_token_late(scores_NE) if late else scores_NE).astype(np.float32)
        chosen_NE = self.chosen(place)
        return Examples(Seen(path, scores_NE, *self._counts(chosen_NE)), chosen_NE)

    def whole_paths(self) -> Iterator[np.ndarray]:
        """For each layer in order, how often each expert is on the token's path before that layer, float32 [N, E].

        Before the first layer it is the whole path of the previous token.
        """
        chosen = (self.chosen(place) for place in range(len(self.meta.layers)))
        yield self._a_token_late(reduce(np.add, chosen))
        yield from accumulate(self.chosen(place) for place in range(len(self.meta.layers) - 1))

    def _layer(self, place: int) -> LayerTrace:
        said = self._trace.layer(self.meta.layers[place])
        return LayerTrace(*(None if tensor is None else tensor[self._rows] for tensor in said))  # type: ignore[arg-type]

    def _weights_at(self, place: int, late: bool) -> np.ndarray:
        """Each token's choice at ``place`` by weight, [N, E]; places below 0 are the previous token's last layers.

        ``late``: the choice of the previous token.
        """
        said = self._layer(place % len(self.meta.layers))
        weights_NK = said.topk_weights_NK.astype(np.float32)
        share_NK = weights_NK / np.maximum(weights_NK.sum(1, keepdims=True), 1e-9)
        path_NE = spread(said.topk_ids_NK, share_NK, self.meta.num_experts)
        return self._a_token_late(path_NE) if late or place < 0 else path_NE

    def _a_token_late(self, values_NE: np.ndarray) -> np.ndarray:
        """For each row, the values of the previous token; zeros for a request's first token."""
        shifted_NE = np.roll(values_NE, 1, axis=0)
        shifted_NE[self._first] = 0
        return shifted_NE

    def _counts(self, chosen_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decayed counts of each request's choices [N, D, E], and of its tokens [N, D, 1], before each token."""
        fading_D1 = DECAYS[:, None]
        counts_NDE = np.zeros((len(self), len(DECAYS), self.meta.num_experts), dtype=np.float32)
        longest_first = np.argsort(self._lengths)[::-1]
        for at in range(1, max(self._lengths)):  # all requests that are long enough at once
            before = self._first[longest_first[: self._longer[at]]] + at - 1
            counts_NDE[before + 1] = counts_NDE[before] * fading_D1 + chosen_NE[before, None]
        within = np.concatenate([np.arange(length) for length in self._lengths])
        totals_ND1 = (1 - fading_D1 ** within[:, None, None]) / (1 - fading_D1)
        return counts_NDE, totals_ND1.astype(np.float32)


def popularity(tokens: Tokens) -> np.ndarray:
    """The share of the tokens that chose each expert, float32 [L, E]."""
    return np.stack([tokens.chosen(place).mean(0) for place in range(len(tokens.meta.layers))])


def affinity(path_NE: np.ndarray, chosen_NE: np.ndarray) -> np.ndarray:
    """How often j was chosen when i was on the path, float32 [E, E]; if i is rare, how often j was chosen at all."""
    prior_E = chosen_NE.mean(0)
    was_NE = (path_NE > 0).astype(np.float32)
    together_EE: np.ndarray = (was_NE.T @ chosen_NE + 2 * prior_E) / (was_NE.sum(0)[:, None] + 2)
    return together_EE
