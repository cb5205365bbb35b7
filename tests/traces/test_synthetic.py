"""Made-up traces against the measured statistics of the models that they stand for (in percent where they are shares).

L layers, N tokens, K top-k, E experts.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from duoserve.errors import ConfigError
from duoserve.traces.synthetic import CARDS, bytes_needed, recall, synthesize
from duoserve.traces.trace import Trace

WINDOWS = (2, 4, 8, 16, 32, 64)
DISTINCT = {
    "mixtral-8x7b": (3.26, 4.90, 6.51, 7.50, 7.87, 7.96),
    "qwen3-30b-a3b": (12.50, 19.17, 28.22, 39.09, 50.54, 61.71),
    "gpt-oss-120b": (6.77, 11.17, 17.76, 26.94, 38.57, 52.06),
    "gpt-oss-20b": (6.14, 9.09, 12.61, 16.24, 19.62, 22.59),
    "deepseek-v2-lite": (10.48, 17.68, 27.99, 40.25, 51.25, 58.22),
}
SHARES = (0.125, 0.25, 0.5)
FREQUENCY_HITS = {"qwen3-30b-a3b": (67.4, 84.0, 96.2), "gpt-oss-120b": (69.5, 84.2, 95.3)}
BELADY_HITS = {"qwen3-30b-a3b": (78.1, 91.1, 98.3), "gpt-oss-120b": (80.2, 91.5, 97.8)}
DECAY = 0.96  # of an expert's count, per token
REQUESTS, TOKENS = 20, 192
WARM_UP = 4 * TOKENS  # an empty cache misses everything once, which long traces do not show


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    return {
        name: synthesize(replace(CARDS[name], num_layers=10), REQUESTS, TOKENS - 1, 0.6, seed=0) for name in DISTINCT
    }


def ids_of(trace: Trace) -> np.ndarray:
    """The choices of all layers, [L, N, K]."""
    return np.stack([trace.layer(layer).topk_ids_NK.astype(np.int64) for layer in trace.meta.layers])


def mean_distinct(ids_LNK: np.ndarray, num_experts: int, window: int) -> float:
    windows = ids_LNK.reshape(-1, window * ids_LNK.shape[2])
    used = np.zeros((len(windows), num_experts), dtype=bool)
    np.put_along_axis(used, windows, True, axis=1)
    return used.sum(1).mean()


@pytest.mark.parametrize("name", DISTINCT)
def test_distinct_experts_of_a_window(traces, name):
    ids_LNK = ids_of(traces[name])
    got = [mean_distinct(ids_LNK, CARDS[name].num_experts, window) for window in WINDOWS]
    np.testing.assert_allclose(got, DISTINCT[name], rtol=0.05)


def hits(ids_LNK: np.ndarray, num_experts: int, worth_NLE: np.ndarray, share: float, bypass: bool) -> float:
    """Percent of hits where each layer keeps its ``share`` of the experts of greatest worth at each token,
    the cache being warm. Without ``bypass`` the token's own experts are admitted first, whatever they are worth.
    """
    capacity = int(share * num_experts)
    inside_LE = np.zeros((len(ids_LNK), num_experts), dtype=bool)
    found = 0
    for at in range(ids_LNK.shape[1]):
        ids_LK = ids_LNK[:, at]
        found += np.take_along_axis(inside_LE, ids_LK, axis=1).sum() * (at >= WARM_UP)
        np.put_along_axis(inside_LE, ids_LK, True, axis=1)
        worth_LE = np.where(inside_LE, worth_NLE[at], -np.inf)
        if not bypass:
            np.put_along_axis(worth_LE, ids_LK, np.inf, axis=1)
        out_LX = np.argpartition(worth_LE, num_experts - capacity, axis=1)[:, : num_experts - capacity]
        np.put_along_axis(inside_LE, out_LX, False, axis=1)
    return 100 * found / ids_LNK[:, WARM_UP:].size


def decayed_frequency(ids_LNK: np.ndarray, num_experts: int) -> np.ndarray:
    counts_NLE = np.zeros((ids_LNK.shape[1], len(ids_LNK), num_experts), dtype=np.float32)
    np.put_along_axis(counts_NLE, ids_LNK.swapaxes(0, 1), 1, axis=2)
    for at in range(1, len(counts_NLE)):
        counts_NLE[at] += DECAY * counts_NLE[at - 1]
    return counts_NLE


def soonness(ids_LNK: np.ndarray, num_experts: int) -> np.ndarray:
    """Minus the token at which an expert is wanted next, after this one."""
    next_NLE = np.full((ids_LNK.shape[1], len(ids_LNK), num_experts), -np.inf, dtype=np.float32)
    for at in range(len(next_NLE) - 2, -1, -1):
        next_NLE[at] = next_NLE[at + 1]
        np.put_along_axis(next_NLE[at], ids_LNK[:, at + 1], -(at + 1), axis=1)
    return next_NLE


@pytest.mark.parametrize("name", FREQUENCY_HITS)
def test_hits_of_caches(traces, name):
    ids_LNK, num_experts = ids_of(traces[name]), CARDS[name].num_experts
    worths = decayed_frequency(ids_LNK, num_experts), soonness(ids_LNK, num_experts)
    frequency = [hits(ids_LNK, num_experts, worths[0], share, bypass=False) for share in SHARES]
    belady = [hits(ids_LNK, num_experts, worths[1], share, bypass=True) for share in SHARES]
    np.testing.assert_allclose(frequency, FREQUENCY_HITS[name], atol=3)
    np.testing.assert_allclose(belady, BELADY_HITS[name], atol=3)


@pytest.mark.parametrize("precision", [0.35, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b"])
def test_look_ahead_is_as_precise_as_asked_for(name, precision):
    trace = synthesize(replace(CARDS[name], num_layers=6), REQUESTS, TOKENS, precision, seed=1)
    layers = [trace.layer(layer) for layer in trace.meta.layers[1:]]
    got = [recall(said.ahead_NE, said.topk_ids_NK.astype(np.int64), CARDS[name].top_k) for said in layers]
    assert np.mean(got) == pytest.approx(precision, abs=0.01)
    np.testing.assert_allclose(got, precision, atol=0.04)


def test_shapes_and_the_order_of_choice():
    card = replace(CARDS["gpt-oss-20b"], num_layers=3)
    trace = synthesize(card, 2, 5, 0.7, seed=2, prompt=4)
    assert (len(trace), trace.num_tokens, trace[1].num_prompt, trace[1].num_steps) == (2, 18, 4, 6)
    assert trace.meta.fingerprint == "synthetic:gpt-oss-20b"
    first, step = list(trace[1].routing(0)), list(trace[1].routing(3))
    assert [len(routing.topk_ids_TK) for routing in (*first, *step)] == [4, 4, 4, 1, 1, 1]
    for routing in (*first, *step):
        assert (np.diff(routing.topk_weights_TK, axis=1) <= 0).all()
        np.testing.assert_allclose(routing.topk_weights_TK.sum(1), 1, atol=1e-3)
        assert all(len(set(row)) == 4 for row in routing.topk_ids_TK.tolist())


def test_a_seed_makes_the_same_trace_again():
    card = replace(CARDS["mixtral-8x7b"], num_layers=2)
    one, again, other = (synthesize(card, 2, 8, 0.8, seed=seed) for seed in (7, 7, 8))
    assert (ids_of(one) == ids_of(again)).all() and (ids_of(one) != ids_of(other)).any()
    assert (one.layer(1).ahead_NE == again.layer(1).ahead_NE).all()


@pytest.mark.parametrize("precision", [0.25, 1.0, float("nan")])
def test_a_precision_that_cannot_be(precision):
    with pytest.raises(ConfigError, match=r"precision is .*mixtral-8x7b allows more than 0.25"):
        synthesize(CARDS["mixtral-8x7b"], 1, 1, precision, seed=0)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_the_memory_for_a_trace_is_known_before_it_is_made(name: str) -> None:
    card = replace(CARDS[name], num_layers=4)
    tracemalloc.start()
    made = synthesize(card, 6, 3000, 0.8, seed=0, prompt=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made) == 6
    assert 0.5 < peak / bytes_needed(card, 6, 4000) <= 1
