"""The recorder keeps no more than the file will have of what it hears."""

from __future__ import annotations

import tracemalloc

import numpy as np

from duoserve.config import Phase
from duoserve.scheduling.routing import Routing
from duoserve.traces.recorder import TraceRecorder
from duoserve.traces.trace import LayerTrace, TraceMeta
from duoserve.traces.trace_file import TraceWriter, open_trace

META = TraceMeta("f", tuple(range(24)), num_experts=128, top_k=4)
PROMPT, STEPS = 500, 20


def hear(recorder: TraceRecorder, rng: np.random.Generator, num_tokens: int) -> None:
    """A pass of ``num_tokens`` tokens; some scores are beyond half precision."""
    recorder.begin(Phase.PREFILL, np.zeros(num_tokens, dtype=np.int64))
    for layer in META.layers:
        ids_TK = (rng.integers(META.num_experts, size=(num_tokens, 1)) + np.arange(META.top_k)) % META.num_experts
        weights_TK = rng.random(ids_TK.shape, dtype=np.float32)
        ahead = {layer + 1: 1e5 * rng.standard_normal((num_tokens, META.num_experts), dtype=np.float32)}
        later = ahead if layer + 1 < len(META.layers) else {}
        recorder.routed(Routing(layer, np.zeros(num_tokens, dtype=np.int64), ids_TK, weights_TK, later))


def test_a_request_takes_little_more_memory_than_its_bytes_in_the_file(tmp_path):
    recorder, rng = TraceRecorder(), np.random.default_rng(0)
    tracemalloc.start()
    try:
        hear(recorder, rng, PROMPT)
        for _ in range(STEPS):
            hear(recorder, rng, 1)
        layers = recorder.take()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    writer = TraceWriter(tmp_path / "t", META)
    writer.append(range(PROMPT + STEPS), PROMPT, layers)
    writer.close()
    read = open_trace(tmp_path / "t")
    assert read.layer(3).ahead_NE.shape == (PROMPT + STEPS, META.num_experts)
    assert np.abs(read.layer(3).ahead_NE).max() == 65504.0
    assert peak < 1.5 * (tmp_path / "t").stat().st_size


def test_what_was_taken_is_forgotten() -> None:
    recorder = TraceRecorder()
    hear(recorder, np.random.default_rng(0), 2)
    first = recorder.take()
    hear(recorder, np.random.default_rng(1), 3)
    assert [len(said.topk_ids_NK) for said in first.values()] == [2] * 24
    assert [len(said.topk_ids_NK) for said in recorder.take().values()] == [3] * 24
    assert recorder.take() == {} and isinstance(first[0], LayerTrace) and first[0].ahead_NE is None
