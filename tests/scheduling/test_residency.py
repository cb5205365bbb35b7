"""The books and a device that lags behind them: slots go from expert to expert while kernels are still to run."""

from __future__ import annotations

import random

import pytest
import torch

from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotTable
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.tickets import Priority
from duoserve.metrics import Meter
from duoserve.scheduling.residency import Residency
from duoserve.scheduling.source import ReadyExpert
from tests.helpers.fake_streams import FakeStreams, LaggingPool
from tests.helpers.fakes import SMALL, InRam


@pytest.mark.parametrize("seed", range(20))
def test_a_freed_slot_is_scrubbed_behind_its_readers_and_before_the_next_copy(seed: int) -> None:
    rng = random.Random(seed)
    store, streams = InRam(num_layers=1, num_experts=8), FakeStreams(rng)
    pool = LaggingPool(2, SMALL, streams)
    engine = StreamCopyEngine(store, pool, streams, num_threads=1)
    residency = Residency(SlotTable(1, 8, 2), pool, engine, Meter())
    wrong: list[ExpertId] = []
    reads = 0

    def kernel(expert: ExpertId, slot: int) -> None:
        nonlocal reads
        reads += 1
        if not torch.equal(pool.row(slot), store.row(expert)):
            wrong.append(expert)

    for step in range(8):
        expert, slot = ExpertId(0, step), rng.randrange(2)
        if residency.table.expert_in(slot) is not None:
            residency.free(slot)
        ticket = residency.load(expert, slot, rng.choice(list(Priority)))
        while not ticket.finished:
            residency.wait([ticket])
        residency.collect()
        assert residency.use(expert) == slot
        streams.run(lambda expert=expert, slot=slot: kernel(expert, slot))
        residency.release(0, [ReadyExpert(expert.expert, slot)])
        residency.table.check_integrity()
    engine.close()
    streams.finish()
    assert reads == 8 and not wrong
