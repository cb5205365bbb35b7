"""Made-up traces with the statistics of real models' routing.

The generator's parameters were fitted to measured traces of the five models in CARDS: windows of tokens use as many
distinct experts, and caches hit as often. How well one layer predicts the next is not fitted: it is a parameter.

R requests, T tokens of one, K top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from duoserve.errors import ConfigError
from duoserve.traces.trace import LayerTrace, Trace, TraceMeta

_LEAST_DRAW = np.float32(1e-30)  # draws are at least this: an exponential draw may be 0, which has no logarithm
_FLAT_NOISE = 64.0  # noise of this standard deviation leaves next to nothing of the scores
_CALIBRATION_ROWS = 8192


@dataclass(frozen=True)
class RoutingCard:
    """A model's sizes, and the parameters of its routers' logits.

    A logit is the sum of Gumbel noise of scale 1; minus ``skew`` times the logarithm of the expert's rank; ``request``
    times a normal draw for each request and expert; and two autoregressive walks over the tokens, with amplitudes
    ``slow`` and ``fast`` and correlations of neighbours ``slow_memory`` and ``fast_memory``.
    """

    name: str
    num_experts: int
    top_k: int
    num_layers: int
    skew: float
    request: float
    slow: float
    slow_memory: float
    fast: float
    fast_memory: float


CARDS = {
    card.name: card
    for card in (
        RoutingCard("qwen3-30b-a3b", 128, 8, 48, 0.0, 2.41, 0.63, 0.88, 0.35, 0.68),
        # The first fit had a skew of 1.31, with which hit rates were up to 4 points too low.
        RoutingCard("gpt-oss-120b", 128, 4, 36, 1.40, 2.24, 0.02, 0.98, 2.23, 0.40),
        RoutingCard("gpt-oss-20b", 32, 4, 24, 1.07, 2.21, 0.47, 0.95, 1.15, 0.07),
        RoutingCard("deepseek-v2-lite", 64, 6, 26, 0.71, 0.56, 0.33, 0.995, 0.37, 0.40),
        RoutingCard("mixtral-8x7b", 8, 2, 32, 0.29, 0.66, 0.48, 0.96, 0.88, 0.28),
    )
}


def synthesize(  # noqa: PLR0913
    card: RoutingCard, requests: int, tokens: int, precision: float, seed: int, *, prompt: int = 1
) -> Trace:
    """A trace of ``requests`` requests, each a prompt of ``prompt`` tokens and ``tokens`` steps behind it.

    Of a token's experts, the share ``precision`` is among the ``top_k`` that rank first in the look-ahead scores.
    Raises ConfigError unless ``precision`` is at least top_k / num_experts and below 1.
    """
    chance = card.top_k / card.num_experts
    if not chance < precision < 1:
        raise ConfigError(
            f"precision is {precision:g}; {card.name} allows more than {chance:g} (chance) and less than 1"
        )
    rng = np.random.default_rng(seed)
    meta = _meta(card)
    shape = requests, prompt + tokens
    layers: dict[int, LayerTrace] = {}
    noise = 0.0
    for layer in meta.layers:
        logits_NE = _logits(card, rng, *shape).reshape(-1, card.num_experts)
        ids_NK, weights_NK = _choose(logits_NE, card.top_k)
        ahead_NE = None
        if layer:
            noise = noise or _noise_for(precision, logits_NE, ids_NK, rng)
            blurred_NE = logits_NE + noise * rng.standard_normal(logits_NE.shape, dtype=np.float32)
            ahead_NE = blurred_NE.astype(np.float16)
        layers[layer] = LayerTrace(ids_NK.astype(meta.ids_dtype), weights_NK.astype(np.float16), ahead_NE)
    requests_R2 = np.tile(np.array([shape[1], prompt], dtype=np.int32), (requests, 1))
    token_ids_N = rng.integers(0, 1 << 31, requests * shape[1], dtype=np.int32)  # so that no two prompts are alike
    return Trace.in_memory(meta, requests_R2, token_ids_N, layers)


def bytes_needed(card: RoutingCard, requests: int, tokens: int) -> int:
    """RAM that ``synthesize`` takes at most, for requests of ``tokens`` tokens each, their prompts included.

    It has the trace's own columns and, while a layer is made, 24 bytes for each expert and token.
    """
    columns = _meta(card).columns().values()
    kept = sum(column.dtype.itemsize * prod(column.row_shape) for column in columns)
    return requests * tokens * (kept + 24 * (card.num_experts + card.top_k))


def recall(scores_NE: np.ndarray, ids_NK: np.ndarray, count: int) -> float:
    """The share of the chosen experts ``ids_NK`` that is among the ``count`` best scores of their row."""
    best_NC = np.argpartition(-scores_NE, count - 1, axis=1)[:, :count]
    among_NE = np.zeros(scores_NE.shape, dtype=bool)
    np.put_along_axis(among_NE, best_NC, True, axis=1)
    return float(np.take_along_axis(among_NE, ids_NK, axis=1).mean())


def _meta(card: RoutingCard) -> TraceMeta:
    return TraceMeta(f"synthetic:{card.name}", tuple(range(card.num_layers)), card.num_experts, card.top_k)


def _logits(card: RoutingCard, rng: np.random.Generator, requests: int, tokens: int) -> np.ndarray:
    """One layer's logits, float32 [R, T, E]."""
    shape = requests, tokens, card.num_experts
    ranks_E = rng.permutation(card.num_experts) + 1
    draws_RTE = rng.standard_exponential(shape, dtype=np.float32)
    logits_RTE = -np.log(np.maximum(draws_RTE, _LEAST_DRAW))  # Gumbel noise
    logits_RTE += card.request * rng.standard_normal((requests, 1, card.num_experts), dtype=np.float32)
    logits_RTE -= (card.skew * np.log(ranks_E)).astype(np.float32)
    logits_RTE += card.slow * _walk(rng, shape, card.slow_memory)
    logits_RTE += card.fast * _walk(rng, shape, card.fast_memory)
    return logits_RTE


def _walk(rng: np.random.Generator, shape: tuple[int, int, int], memory: float) -> np.ndarray:
    """An autoregressive walk of variance 1 along the middle axis."""
    walk_RTE = rng.standard_normal(shape, dtype=np.float32)
    walk_RTE[:, 1:] *= np.float32((1 - memory**2) ** 0.5)
    for at in range(1, shape[1]):
        walk_RTE[:, at] += np.float32(memory) * walk_RTE[:, at - 1]
    return walk_RTE


def _choose(logits_NE: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids [N, K] of the highest logits in descending order, and a softmax over them."""
    ids_NK = np.argpartition(-logits_NE, top_k - 1, axis=1)[:, :top_k]
    chosen_NK = np.take_along_axis(logits_NE, ids_NK, axis=1)
    order_NK = np.argsort(-chosen_NK, axis=1)
    ids_NK, chosen_NK = (np.take_along_axis(a, order_NK, axis=1) for a in (ids_NK, chosen_NK))
    weights_NK = np.exp(chosen_NK - chosen_NK[:, :1])
    return ids_NK, weights_NK / weights_NK.sum(1, keepdims=True)


def _noise_for(precision: float, logits_NE: np.ndarray, ids_NK: np.ndarray, rng: np.random.Generator) -> float:
    """The standard deviation of the noise that leaves look-ahead scores with a recall of ``precision``."""
    rows = rng.permutation(len(logits_NE))[:_CALIBRATION_ROWS]
    logits_NE, ids_NK = logits_NE[rows], ids_NK[rows]
    draws_NE = rng.standard_normal(logits_NE.shape, dtype=np.float32)
    low, high = 0.0, _FLAT_NOISE
    for _ in range(16):
        noise = (low + high) / 2
        if recall(logits_NE + noise * draws_NE, ids_NK, ids_NK.shape[1]) > precision:
            low = noise
        else:
            high = noise
    return (low + high) / 2
