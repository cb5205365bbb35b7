"""What happens when, on a real link and without a model: the timeline that virtual links are held to elsewhere.

tests/scheduling/test_gpu_timeline.py asserts the same, and more sharply where a real host takes its time too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor

from duoserve.config import Phase
from duoserve.experts.cuda_streams import CudaStreams
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.tickets import PIECE_BYTES, Priority
from duoserve.metrics import Meter
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.scheduler import Scheduler
from tests.scheduling.fortune import Teller, certain, routed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and its link"),
]
LAYERS, EXPERTS, TOP_K = 4, 8, 2
LAYOUT = ExpertLayout(torch.bfloat16, hidden=2048, intermediate=2048)  # 24 MiB: three pieces
LARGE = ExpertLayout(torch.bfloat16, hidden=4096, intermediate=4096)  # 96 MiB: what the host does is little beside it
SLOWER = 1.10  # than what the bytes take on the link
SPIN = 2_000_000  # cycles: about a millisecond


class Numbered(ExpertStore):
    """Experts in pinned RAM; every byte of one is its number."""

    def __init__(self, layout: ExpertLayout) -> None:
        self.layout = layout
        self.rows_NB = torch.empty(LAYERS * EXPERTS, layout.slot_bytes, dtype=torch.uint8, pin_memory=True)
        self.rows_NB.copy_(torch.arange(LAYERS * EXPERTS, dtype=torch.uint8)[:, None])

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        row_B.copy_(self.host_row(expert))

    def host_row(self, expert: ExpertId) -> Tensor:
        return self.rows_NB[number(expert)]

    def close(self) -> None:
        """Nothing to release."""


def number(expert: ExpertId) -> int:
    return expert.layer * EXPERTS + expert.expert


class Rig:
    """A scheduler over the real link, and kernels that look at what they find in the slots."""

    def __init__(self, store: Numbered, policy: str, slots: int, predictor: Predictor | None = None) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.store = store
        self.meter = Meter()
        self.copies = 0
        self.pool = SlotPool(slots, store.layout, device=device)
        self.streams = CudaStreams(device)
        self.engine = StreamCopyEngine(store, self.pool, self.streams, on_copied=self.copied)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        shape = ModelShape(EXPERTS, TOP_K, tuple(range(LAYERS)))
        self.scheduler = Scheduler(shape, self.pool, self.engine, get_policy(policy), self.meter, predictor)

    def copied(self, begin_s: float, end_s: float, nbytes: int) -> None:
        self.copies += 1
        self.meter.copied(begin_s, end_s, nbytes)

    def read(self, expert: ExpertId, slot: int) -> None:
        self.wrong += (self.pool.row(slot) != number(expert)).sum()

    def run(self, phase: Phase, routing: Sequence[Sequence[int]], tokens: int) -> float:
        """A pass; returns its seconds."""
        torch.cuda.synchronize()
        begun = time.perf_counter()
        heard = self.scheduler.listener
        if heard is not None:
            heard.begin(phase, np.zeros(tokens, dtype=np.int64))
        self.scheduler.begin(phase, tokens)
        for layer, wanted in enumerate(routing):
            torch.cuda.current_stream().synchronize()  # the router's choice
            with self.scheduler.acquire(layer, wanted) as lease:
                if heard is not None:
                    heard.routed(routed(layer, wanted))
                    lease.prefetch()
                for ready in lease:
                    for expert, slot in ready:
                        self.read(ExpertId(layer, expert), slot)
        self.scheduler.end()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        self.engine.settle()
        return ended - begun


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest) -> Numbered:
    return Numbered(getattr(request, "param", LAYOUT))


@pytest.fixture(scope="module")
def copy_s(store: Numbered) -> float:
    """Seconds of an expert on the link, one behind another: the median of five times ten."""
    row_B, took = torch.empty(store.layout.slot_bytes, dtype=torch.uint8, device="cuda"), []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for source_B in store.rows_NB[:10]:
            row_B.copy_(source_B, non_blocking=True)
        torch.cuda.synchronize()
        took.append((time.perf_counter() - begun) / 10)
    return sorted(took)[2]


@pytest.fixture
def rig(request: pytest.FixtureRequest, store: Numbered) -> Iterator[Rig]:
    made = Rig(store, *request.param)
    with closing(made.scheduler):
        yield made
    torch.cuda.synchronize()
    assert int(made.wrong) == 0, "a kernel read a slot before its expert was there, or after it was gone"


@pytest.mark.parametrize("rig", [("lru", 6)], indirect=True)
def test_the_link_is_busy_in_a_prefill(rig: Rig, copy_s: float) -> None:
    """At least 95 % of the time, in the best of five."""
    shares = []
    for _ in range(5):
        before = rig.copies
        seconds = rig.run(Phase.PREFILL, [list(range(EXPERTS))] * LAYERS, 1000)
        shares.append((rig.copies - before) * copy_s / seconds)
    assert max(shares) >= 0.95


@pytest.mark.parametrize("store", [LARGE], indirect=True, ids=["large"])
@pytest.mark.parametrize("rig", [("lru", LAYERS * TOP_K)], indirect=True)
def test_a_token_takes_what_its_misses_take_on_the_link(rig: Rig, copy_s: float) -> None:
    """Every expert of every second token is missing; the median of ten."""
    steps = [[[0, 1]] * LAYERS, [[2, 3]] * LAYERS]
    seconds = [rig.run(Phase.DECODE, steps[step % 2], 1) for step in range(14)][4:]
    assert sorted(seconds)[5] <= SLOWER * LAYERS * TOP_K * copy_s


@pytest.mark.parametrize("rig", [("duoserve", 8, Teller(lambda layer: certain(EXPERTS, [4])))], indirect=True)
def test_the_budget_of_guesses_knows_what_a_copy_takes_on_the_link(rig: Rig, copy_s: float) -> None:
    steps = [[[0, 1]] * LAYERS, [[2, 3]] * LAYERS]
    for step in range(20):
        rig.run(Phase.DECODE, steps[step % 2], 1)
    measured_s = rig.scheduler._foresight.link.copy_s
    assert measured_s is not None and copy_s / 2 <= measured_s <= 2 * copy_s


@pytest.mark.parametrize("rig", [("lru", 8)], indirect=True)
def test_a_demand_waits_behind_no_more_than_a_piece_of_guesses(rig: Rig, copy_s: float) -> None:
    engine, waited = rig.engine, []
    for _ in range(5):
        guesses = [engine.submit(ExpertId(0, slot), slot, Priority.PREFETCH) for slot in range(7)]
        while not any(ticket.sent for ticket in guesses):
            time.sleep(1e-5)
        begun = time.perf_counter()
        demand = engine.submit(ExpertId(1, 7), 7, Priority.DEMAND)
        while not demand.finished:
            engine.settle()
        waited.append(time.perf_counter() - begun)
        while left := [ticket for ticket in guesses if not ticket.finished]:
            engine.wait(left)
        torch.cuda.synchronize()
    piece_s = copy_s * PIECE_BYTES / LAYOUT.slot_bytes
    assert sorted(waited)[2] <= SLOWER * (piece_s + copy_s) + 1e-4


@pytest.mark.parametrize("rig", [("lru", 2)], indirect=True)
def test_a_slot_is_rewritten_only_when_its_readers_are_done(rig: Rig) -> None:
    """The host is far ahead: the readers have not begun when the next copy into their slot is asked for."""
    for step in range(20):
        expert, slot = ExpertId(step % LAYERS, step % EXPERTS), step % 2
        priority = Priority.PREFETCH if step % 3 == 0 else Priority.DEMAND
        ticket = rig.engine.submit(expert, slot, priority)
        while not ticket.finished:
            rig.engine.wait([ticket])
        torch.cuda._sleep(SPIN)
        rig.read(expert, slot)
        rig.engine.fence([slot])
