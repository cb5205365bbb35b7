"""Small traces made by hand or by chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from duoserve.scheduling.synthetic import RoutingCard, synthesize
from duoserve.scheduling.trace import IDS, LOOKAHEAD, REQUESTS, TOKEN_IDS, WEIGHTS, MemoryRows, Trace, TraceMeta


def trace_of(requests: list[tuple[int, list[list[int]]]], layers: int = 1, num_experts: int = 8) -> Trace:
    """Of each request the length of its prompt and the experts of each of its tokens, alike in every layer."""
    tokens = [token for _, course in requests for token in course]
    meta = TraceMeta("by hand", tuple(range(layers)), num_experts, len(tokens[0]))
    ids_NK = np.array(tokens, dtype=meta.ids_dtype)
    tensors = {
        REQUESTS: np.array([[len(course), prompt] for prompt, course in requests], dtype=np.int32),
        TOKEN_IDS: np.zeros(len(tokens), dtype=np.int32),
    }
    for layer in range(layers):
        tensors[f"{IDS}.{layer}"] = ids_NK
        tensors[f"{WEIGHTS}.{layer}"] = np.full(ids_NK.shape, 1 / ids_NK.shape[1], dtype=np.float16)
        if layer:
            tensors[f"{LOOKAHEAD}.{layer}"] = np.zeros((len(tokens), num_experts), dtype=np.float16)
    return Trace(meta, MemoryRows(tensors))


SMALL_CARD = RoutingCard("small", 16, 2, 6, 0.5, 1.5, 0.6, 0.9, 0.3, 0.6)


def drawn_trace(seed: int = 0, requests: int = 3, tokens: int = 40, precision: float = 0.8, prompt: int = 12) -> Trace:
    """Six layers of 16 experts, of which two are chosen."""
    made = synthesize(SMALL_CARD, requests, tokens, precision, seed, prompt=prompt)
    return Trace(replace(made.meta, fingerprint="drawn"), made._rows)
