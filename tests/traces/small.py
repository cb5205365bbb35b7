"""Small traces that tests of several floors share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duoserve.traces.trace import LOOKAHEAD, REQUESTS, TOKEN_IDS, MemoryRows, Trace, TraceMeta
from duoserve.traces.trace_file import TraceWriter

META = TraceMeta("a fingerprint", (0, 2, 3), num_experts=6, top_k=2)
LENGTHS = [(4, 2), (5, 3), (3, 1)]


def small_trace(meta: TraceMeta = META, lengths: list[tuple[int, int]] = LENGTHS, seed: int = 0) -> Trace:
    """A trace of random choices; ``lengths`` has tokens and prompt tokens of each request."""
    rng = np.random.default_rng(seed)
    total = sum(length for length, _ in lengths)
    tensors = {REQUESTS: np.array(lengths, dtype=np.int32), TOKEN_IDS: np.arange(total, dtype=np.int32)}
    for name, (dtype, (*width,)) in meta.columns().items():
        if name.startswith("topk_ids"):
            tensors[name] = np.argsort(rng.random((total, meta.num_experts)), axis=1)[:, : meta.top_k].astype(dtype)
        elif name.startswith(("topk_weights", LOOKAHEAD)):
            tensors[name] = rng.random((total, *width)).astype(dtype)
    return Trace(meta, MemoryRows(tensors))


def save_trace(trace: Trace, path: Path, first: int = 0, last: int = 99) -> None:
    """Adds some of its requests to the file, one by one."""
    writer = TraceWriter(path, trace.meta)
    for request in list(trace)[first:last]:
        writer.append(request.token_ids_T, request.num_prompt, request.layers)
    writer.close()
