"""Some requests of a trace, in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duoserve.scheduling.trace import IDS, LOOKAHEAD, REQUESTS, TOKEN_IDS, WEIGHTS, MemoryRows, Trace


def select(trace: Trace, numbers: Sequence[int]) -> Trace:
    """The requests of these ``numbers``, in that order, as a trace of its own."""
    requests = [trace[number] for number in numbers]
    sizes = [(len(request.token_ids_T), request.num_prompt) for request in requests]
    tensors = {
        REQUESTS: np.array(sizes, dtype=np.int32).reshape(-1, 2),
        TOKEN_IDS: np.concatenate([request.token_ids_T for request in requests]),
    }
    for layer in trace.meta.layers:
        parts = [request.layers[layer] for request in requests]
        tensors[f"{IDS}.{layer}"] = np.concatenate([part.topk_ids_NK for part in parts])
        tensors[f"{WEIGHTS}.{layer}"] = np.concatenate([part.topk_weights_NK for part in parts])
        scores = [part.ahead_NE for part in parts if part.ahead_NE is not None]
        if scores:
            tensors[f"{LOOKAHEAD}.{layer}"] = np.concatenate(scores)
    return Trace(trace.meta, MemoryRows(tensors))
