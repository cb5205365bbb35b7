"""A listener hears of recorded steps what it hears of the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duoserve.experts.layout import ExpertId
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.lagging import LaggingDevice, write
from tests.helpers.listeners import Copying

PROMPTS, MAX_TOKENS = [[3, 1, 4], [1, 5]], [6, 4]


def heard(folder: Path, mode: str) -> Copying:
    device = LaggingDevice(seed=5, in_ram=[ExpertId(layer, expert) for layer in range(3) for expert in range(8)])
    listener = Copying(lookahead=1)

    runner = device.recorded(mode, record_after=0 if mode else 10**6)
    with assembled(folder, "lru", 9, device.copies, listener, make_pool=device.pool, make_step_runner=runner) as engine:
        write(engine, PROMPTS, MAX_TOKENS)
    return listener


@pytest.mark.parametrize("mode", ["event", "graph"])
def test_the_same_routings(mode: str, tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path)
    true, recorded = heard(folder, ""), heard(folder, mode)
    assert true.begun == recorded.begun and [len(routings) for routings in true.routings] == [3] * max(MAX_TOKENS)
    for routings, others in zip(true.routings, recorded.routings, strict=True):
        for one, other in zip(routings, others, strict=True):
            assert one.layer == other.layer and sorted(one.ahead) == sorted(other.ahead)
            arrays = [(r.topk_ids_TK, r.topk_weights_TK, *r.ahead.values()) for r in (one, other)]
            assert all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))
