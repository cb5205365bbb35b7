"""Requests and layers out of a trace."""

from __future__ import annotations

import numpy as np
import pytest

from duoserve.errors import TraceError
from duoserve.traces.trace import MemoryRows, Trace, TraceMeta
from tests.traces.small import small_trace


def test_a_request_is_its_prompt_and_then_token_after_token():
    trace = small_trace()
    request = trace[1]
    assert (len(trace), trace.num_tokens, request.number, request.num_prompt, request.num_steps) == (3, 12, 1, 3, 3)
    assert request.token_ids_T.tolist() == [4, 5, 6, 7, 8]
    for step, rows in enumerate([[4, 5, 6], [7], [8]]):
        routings = list(request.routing(step))
        assert [routing.layer for routing in routings] == [0, 2, 3]
        assert [sorted(routing.ahead) for routing in routings] == [[2], [3], []]
        for routing in routings:
            whole = trace.layer(routing.layer)
            assert routing.requests_T.tolist() == [1] * len(rows)
            np.testing.assert_array_equal(routing.topk_ids_TK, whole.topk_ids_NK[rows])
            np.testing.assert_array_equal(routing.topk_weights_TK, whole.topk_weights_NK[rows])
            assert (routing.topk_ids_TK.dtype, routing.topk_weights_TK.dtype) == (np.int64, np.float32)
            for later, scores_TE in routing.ahead.items():
                assert scores_TE.dtype == np.float32
                np.testing.assert_array_equal(scores_TE, trace.layer(later).ahead_NE[rows])


def test_a_layer_of_all_requests_or_of_some_rows():
    trace = small_trace()
    assert trace.layer(0).ahead_NE is None
    assert [trace.layer(2, 3, 7).topk_ids_NK.shape, trace.layer(2).ahead_NE.shape] == [(4, 2), (12, 6)]
    assert trace.starts_R.tolist() == [0, 4, 9, 12]
    assert [request.number for request in trace] == [0, 1, 2]


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_that_is_not_there(step):
    with pytest.raises(TraceError, match=f"step {step} of a request with 3 steps"):
        list(small_trace()[1].routing(step))


@pytest.mark.parametrize("number", [-1, 3])
def test_a_request_that_is_not_there(number):
    with pytest.raises(IndexError, match=f"request {number} of a trace of 3"):
        small_trace()[number]


def test_an_empty_trace():
    meta = TraceMeta("f", (0,), 4, 2)
    rows = {name: np.zeros((0, *shape), dtype) for name, (dtype, shape) in meta.columns().items()}
    assert len(Trace(meta, MemoryRows(rows))) == Trace(meta, MemoryRows(rows)).num_tokens == 0


def test_a_token_of_a_layer_of_128_experts_takes_280_bytes():
    columns = TraceMeta("f", tuple(range(48)), 128, 8).columns()
    columns.pop("requests")
    per_token = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in columns.values())
    assert per_token / 48 <= 280.1
    assert TraceMeta("f", (0,), 257, 8).columns()["topk_ids.0"][0] == np.uint16
