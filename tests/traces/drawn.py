"""Small traces made by hand or by chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from duoserve.traces.synthetic import RoutingCard, synthesize
from duoserve.traces.trace import LayerTrace, Trace, TraceMeta


def trace_of(requests: list[tuple[int, list[list[int]]]], layers: int = 1, num_experts: int = 8) -> Trace:
    """Of each request the length of its prompt and the experts of each of its tokens, alike in every layer."""
    tokens = [token for _, course in requests for token in course]
    meta = TraceMeta("by hand", tuple(range(layers)), num_experts, len(tokens[0]))
    ids_NK = np.array(tokens, dtype=meta.ids_dtype)
    weights_NK = np.full(ids_NK.shape, 1 / ids_NK.shape[1], dtype=np.float16)
    ahead_NE = np.zeros((len(tokens), num_experts), dtype=np.float16)
    routed = {layer: LayerTrace(ids_NK, weights_NK, ahead_NE if layer else None) for layer in range(layers)}
    requests_R2 = np.array([[len(course), prompt] for prompt, course in requests], dtype=np.int32)
    return Trace.in_memory(meta, requests_R2, np.arange(len(tokens), dtype=np.int32), routed)


SMALL_CARD = RoutingCard("small", 16, 2, 6, 0.5, 1.5, 0.6, 0.9, 0.3, 0.6)


def drawn_trace(seed: int = 0, requests: int = 3, tokens: int = 40, precision: float = 0.8, prompt: int = 12) -> Trace:
    """Six layers of 16 experts, of which two are chosen."""
    made = synthesize(SMALL_CARD, requests, tokens, precision, seed, prompt=prompt)
    return Trace(replace(made.meta, fingerprint="drawn"), made._rows)
