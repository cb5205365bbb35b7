"""What a history knows, pass by pass."""

from __future__ import annotations

import numpy as np
import pytest

from duoserve.config import Phase
from duoserve.predictors.features import DECAYS
from duoserve.predictors.history import History
from duoserve.scheduling.routing import Routing
from duoserve.traces.trace import TraceMeta

META = TraceMeta("f", (1, 4, 5, 6), num_experts=4, top_k=2)
A, B, C = [0, 1], [1, 2], [2, 3]


def routing(layer: int, requests: list[int], ids: list[list[int]], ahead=None) -> Routing:
    weights = np.full((len(ids), 2), 0.5, dtype=np.float32)
    return Routing(layer, np.array(requests), np.array(ids), weights, ahead or {})


def shown(path_TE: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in path_TE]


def step(history: History, requests: list[int], *ids: list[list[int]], phase: Phase = Phase.DECODE) -> None:
    history.begin(phase, np.array(requests))
    for layer, chosen in zip(META.layers, ids, strict=False):
        history.observe(routing(layer, requests, chosen))


def test_the_path_of_a_token_goes_on_into_the_next():
    history = History(META)
    step(history, [7], [A], [B], [C], [A])
    assert [shown(one) for one in history.path] == [[A], [C], [B]]
    assert history.whole_path_TE.tolist() == [[2, 3, 2, 1]]
    assert [history.distance(layer) for layer in META.layers] == [1, 2, 3, 4]
    history.begin(Phase.DECODE, np.array([7]))
    assert [shown(one) for one in history.path] == [[A], [C], [B]]
    history.observe(routing(1, [7], [B]))
    assert [shown(one) for one in history.path] == [[B], [A], [C]]
    assert history.whole_path_TE.tolist() == [[0, 1, 1, 0]]
    assert history.distance(4) == 1 and history.distance(1) == 4


def test_a_prompt_hands_on_its_last_row():
    history = History(META)
    step(history, [7, 7, 8, 8, 8], *[[A, B, B, A, C]] * 4)
    assert history.num_rows == 2 and shown(history.path[0]) == [B, C]
    step(history, [8, 7])
    assert shown(history.path[0]) == [C, B]
    step(history, [9])
    assert shown(history.path[0]) == [[]]


def test_within_a_prompt_every_row_has_its_own_path():
    history = History(META)
    step(history, [7, 7], [A, B])
    assert history.num_rows == 2 and shown(history.path[0]) == [A, B]


def test_counts_fade_by_the_token_whatever_the_steps_are():
    one, other = History(META), History(META)
    tokens = [A, B, C, A, B]
    for token in tokens:
        step(one, [7], *[[token]] * 4)
    step(other, [7], *[tokens[:1]] * 4)
    step(other, [8], *[[C]] * 4)
    step(other, [7, 7, 7], *[tokens[1:4]] * 4)
    step(other, [7], *[tokens[4:]] * 4)
    for history in (one, other):
        counts_TDE, totals_TD1 = history.counts(5)
        want = sum(np.isin(np.arange(4), token) * DECAYS[:, None] ** (4 - at) for at, token in enumerate(tokens))
        np.testing.assert_allclose(counts_TDE[0], want, rtol=1e-5)
        np.testing.assert_allclose(totals_TD1[0, :, 0], sum(DECAYS**n for n in range(5)), rtol=1e-5)


def test_requests_of_a_shared_step_are_counted_apart():
    history = History(META)
    step(history, [7, 8], *[[A, C]] * 4)
    step(history, [8, 7], *[[C, A]] * 4)
    counts_TDE, _ = history.counts(1)
    assert [np.flatnonzero(row[0]).tolist() for row in counts_TDE] == [C, A]


def test_the_request_not_seen_for_longest_is_forgotten():
    history = History(META)
    for number in range(65):
        step(history, [number], *[[A]] * 4)
    step(history, [1])
    assert history.counts(1)[0].any()
    step(history, [0])
    assert not history.counts(1)[0].any()


def test_a_prompt_of_many_rows_is_one_request():
    history = History(META)
    for number in range(65):
        step(history, [number] * 100, *[[A] * 100] * 4, phase=Phase.PREFILL)
    step(history, [1])
    assert history.counts(1)[0].any()
    step(history, [0])
    assert not history.counts(1)[0].any()


def test_more_requests_at_once_than_are_remembered():
    history = History(META)
    step(history, list(range(100)), *[[A, B] * 50] * 4)
    assert [np.flatnonzero(row[0]).tolist() for row in history.counts(6)[0]] == [A, B] * 50


def test_a_prefill_begins_a_request_anew():
    history = History(META)
    step(history, [7, 8], *[[A, B]] * 4)
    step(history, [7], phase=Phase.PREFILL)
    assert not history.counts(1)[0].any() and shown(history.path[0]) == [[]]
    step(history, [8])
    assert history.counts(1)[0].any()


def test_scores_are_of_this_layer_only():
    history = History(META)
    history.begin(Phase.DECODE, np.array([7]))
    history.observe(routing(1, [7], [A], {4: np.ones((1, 4))}))
    assert list(history.ahead) == [4]
    history.begin(Phase.DECODE, np.array([7]))
    assert not history.ahead


@pytest.mark.parametrize("requests", [[7], [7, 7], [7, 8]])
def test_before_the_first_pass_nothing_is_known(requests):
    history = History(META)
    history.begin(Phase.DECODE, np.array(requests))
    assert (history.last, history.num_rows, history.distance(1), len(history.path)) == (-1, len(requests), 1, 0)
