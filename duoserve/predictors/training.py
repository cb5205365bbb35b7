"""Trains a predictor on a trace, with some requests held out to measure how good it has become.

N tokens, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from duoserve.errors import TraceError
from duoserve.predictors.activation_matrix import ActivationMatrixPredictor
from duoserve.predictors.affinity import AffinityPredictor
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.examples import Tokens, affinity, popularity
from duoserve.predictors.features import margins
from duoserve.predictors.learned import LayerNetwork, LearnedPredictor, inputs
from duoserve.predictors.lookahead import LookaheadPredictor, logistic
from duoserve.predictors.networks import Data, Recipe, fit_layer, fit_perceptron
from duoserve.predictors.paper import PaperPredictor, paper_inputs
from duoserve.predictors.popularity import PopularityPredictor
from duoserve.torch_modes import as_in_new_thread
from duoserve.traces.trace import Trace

HELD_OUT_SHARE = 0.15
STOPPING_SHARE = 0.15  # the share of the other requests that determines when the training of a network ends
MOST_MATRICES = 128
PAPER_DEPTH = 7
RIDGE = 1e-9  # a penalty on slopes, so that there is a best slope even if all scores are equal
LAYER_RECIPE = Recipe(
    width=64, epochs=30, patience=4, learning_rate=3e-3, weight_decay=1e-2, batch=512, epoch_rows=60_000
)
PAPER_RECIPE = Recipe(
    width=512, epochs=20, patience=4, learning_rate=1e-3, weight_decay=0.0, batch=256, epoch_rows=12_000
)


@dataclass(frozen=True)
class Split:
    """A trace's tokens to train on. Networks are trained on ``fit`` until they get worse on ``stop``.

    The two share no prompt and make up ``train``; if that has only one prompt, both are all of it.
    """

    train: Tokens
    fit: Tokens
    stop: Tokens
    horizon: int
    progress: bool


def train(
    trace: Trace, kind: str, *, horizon: int = 1, seed: int = 0, progress: bool = False
) -> tuple[RowPredictor, list[int]]:
    """A predictor of this ``kind`` (a key of KINDS), and the numbers of the requests that were held out.

    Requests of one prompt are held out together, and requests that decode before others. ``horizon`` is how many layers
    ahead the kind "duoserve" learns to look. Raises TraceError for a trace of fewer than two prompts.
    """
    by_prompt = _by_prompt(trace)
    if len(by_prompt) < 2:
        found = f"the trace has {len(trace)} requests of {len(by_prompt)} different prompts"
        raise TraceError(f"{found}, but training holds some out and needs at least 2: record more")
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(by_prompt)).tolist()
    groups = [by_prompt[at] for at in order]
    groups.sort(key=lambda numbers: not trace.decodes_R[numbers].any())
    held_out, rest = _parted(groups, HELD_OUT_SHARE)
    stop, fit = _parted(rest, STOPPING_SHARE) if len(rest) > 1 else (rest, rest)
    train_tokens, fit_tokens, stop_tokens = (Tokens(trace, _joined(numbers)) for numbers in (rest, fit, stop))
    # Optimizers use the default device, which the calling program may have changed.
    with as_in_new_thread(), torch.device("cpu"):
        predictor = KINDS[kind](Split(train_tokens, fit_tokens, stop_tokens, horizon, progress))
    predictor.trained_on = frozenset(trace.prompt_marks[number] for number in _joined(rest))
    return predictor, _joined(held_out)


def _by_prompt(trace: Trace) -> list[list[int]]:
    """The numbers of the requests, grouped by prompt: to know one request of a prompt is to know much of the others."""
    found: dict[str, list[int]] = {}
    for number, mark in enumerate(trace.prompt_marks):
        found.setdefault(mark, []).append(number)
    return list(found.values())


def _parted(groups: Sequence[list[int]], share: float) -> tuple[list[list[int]], list[list[int]]]:
    """The first groups, with a ``share`` of the requests or a little more, and the others; at least one group each."""
    wanted, taken, count = round(share * sum(map(len, groups))), 1, len(groups[0])
    while taken < len(groups) - 1 and count < wanted:
        count += len(groups[taken])
        taken += 1
    return list(groups[:taken]), list(groups[taken:])


def _joined(groups: Iterable[list[int]]) -> list[int]:
    return sorted(chain.from_iterable(groups))


def train_popularity(split: Split) -> PopularityPredictor:
    """Counts how often experts are chosen."""
    return PopularityPredictor(split.train.meta, popularity(split.train))


def train_affinity(split: Split) -> AffinityPredictor:
    """Counts how often experts of neighbouring layers are chosen together."""
    return AffinityPredictor(split.train.meta, popularity(split.train), _affinities(split))


def train_activation_matrix(split: Split) -> ActivationMatrixPredictor:
    """Stores the matrices of up to MOST_MATRICES requests."""
    layers = range(len(split.train.meta.layers))
    shares = [[rows.mean(0) for rows in split.train.by_request(split.train.chosen(place))] for place in layers]
    matrices_MLE = np.array(shares, dtype=np.float32).swapaxes(0, 1)[:MOST_MATRICES]
    return ActivationMatrixPredictor(split.train.meta, np.ascontiguousarray(matrices_MLE))


def train_lookahead(split: Split) -> LookaheadPredictor:
    """Fits, for each layer, how a margin becomes a chance."""
    fits = [(0.0, 0.0)]
    for place in range(1, len(split.train.meta.layers)):
        said = split.train.examples(place, 1)
        assert said.seen.scores_TE is not None, "every layer but the first is looked ahead to"
        fits.append(_platt(margins(said.seen.scores_TE, split.train.meta.top_k), said.chosen_NE))
    slopes_L, offsets_L = np.array(fits, dtype=np.float32).T
    return LookaheadPredictor(split.train.meta, popularity(split.train), slopes_L.copy(), offsets_L.copy())


def train_paper(split: Split) -> PaperPredictor:
    """Trains the paper's perceptron, one for all layers, with the loss weighted as in the paper."""
    meta, popularity_LE, affinity_LEE = split.train.meta, popularity(split.train), _affinities(split)
    most = PAPER_RECIPE.epochs * PAPER_RECIPE.epoch_rows // len(meta.layers)  # examples of a layer that can be drawn

    def data(tokens: Tokens) -> Data:
        x, y = [], []
        for place, path_NE in enumerate(tokens.whole_paths()):
            one = tokens.examples(place, 1)
            rows = slice(None) if len(tokens) <= most else torch.randperm(len(tokens))[:most].numpy()
            affinity_NE = (one.seen.path[0][rows] > 0).astype(np.float32) @ affinity_LEE[place]
            x.append(paper_inputs(path_NE[rows], popularity_LE[place], affinity_NE))
            y.append(one.chosen_NE[rows])
        return np.concatenate(x), np.concatenate(y)

    weight = (meta.num_experts - meta.top_k) / meta.top_k
    recipe = Recipe(**(vars(PAPER_RECIPE) | {"positive_weight": weight}))
    layers = fit_perceptron(data(split.fit), data(split.stop), recipe, PAPER_DEPTH)
    weights, biases = zip(*layers, strict=True)
    return PaperPredictor(meta, popularity_LE, affinity_LEE, weights, biases)


def train_duoserve(split: Split) -> LearnedPredictor:
    """Trains a network for each layer and number of layers ahead."""
    places = [(p, d) for d in range(1, split.horizon + 1) for p in range(len(split.train.meta.layers))]
    bar = tqdm(places, desc="train", unit="network", disable=not split.progress)
    return LearnedPredictor(split.train.meta, {place: _layer_network(split, *place) for place in bar})


KINDS: dict[str, Callable[[Split], RowPredictor]] = {
    "popularity": train_popularity,
    "affinity": train_affinity,
    "activation-matrix": train_activation_matrix,
    "paper": train_paper,
    "lookahead": train_lookahead,
    "duoserve": train_duoserve,
}


def _affinities(split: Split) -> np.ndarray:
    """The affinities to each layer from the one before, float32 [L, E, E]."""
    said = (split.train.examples(place, 1) for place in range(len(split.train.meta.layers)))
    return np.stack([affinity(one.seen.path[0], one.chosen_NE) for one in said])


def _layer_network(split: Split, place: int, distance: int) -> LayerNetwork:
    top_k = split.train.meta.top_k
    train, stop = (tokens.examples(place, distance) for tokens in (split.fit, split.stop))
    scores_NE = train.seen.scores_TE
    scale = 1.0 if scores_NE is None else max(1e-6, float(margins(scores_NE, top_k).std()))
    prior_E = train.chosen_NE.mean(0)
    affinity_EE = affinity(train.seen.path[0], train.chosen_NE)
    data = [(inputs(one.seen, top_k, scale, affinity_EE, prior_E), one.chosen_NE) for one in (train, stop)]
    looks_ahead = scores_NE is not None and distance == 1
    arrays = fit_layer(data[0], data[1], LAYER_RECIPE, looks_ahead)
    return LayerNetwork(**arrays, scale_1=np.array([scale], np.float32), affinity_EE=affinity_EE, prior_E=prior_E)


def _platt(margins_NE: np.ndarray, chosen_NE: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic curve that fits best, by Newton's method; 0 for a slope without evidence."""
    middle, scale = float(margins_NE.mean()), max(1e-6, float(margins_NE.std()))
    x_N, y_N = ((margins_NE - middle) / scale).ravel().astype(np.float64), chosen_NE.ravel()
    design_N2, at_2 = np.stack([x_N, np.ones_like(x_N)], axis=1), np.array([1.0, 0.0])
    for _ in range(12):
        chance_N = logistic(design_N2 @ at_2)
        curvature_N = chance_N * (1 - chance_N) + 1e-9
        curvature_22 = (design_N2 * curvature_N[:, None]).T @ design_N2 + RIDGE * np.eye(2)
        at_2 += np.linalg.solve(curvature_22, design_N2.T @ (y_N - chance_N) - RIDGE * at_2)
    slope = float(at_2[0] / scale)
    return slope, float(at_2[1]) - slope * middle
