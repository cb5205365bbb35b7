"""Reads that fail: who is told, and that the next request does not notice."""

from __future__ import annotations

import pytest

from duoserve.config import Phase
from duoserve.errors import ClosedError, CopyError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotState
from duoserve.experts.tickets import TicketState
from tests.scheduling.rig import Rig

ALL = list(range(8))
POISON = 0xFF


def assert_settled(rig: Rig) -> None:
    """Every slot is EMPTY, and then poisoned, or READY with its expert's bytes; none is held."""
    rig.table.check_integrity()
    assert rig.num_holds() == rig.num_states(SlotState.LOADING) == 0
    for slot in range(rig.table.num_slots):
        expert = rig.table.expert_in(slot)
        row_B = rig.pool.row(slot)
        assert bool((row_B == (POISON if expert is None else rig.store.row(expert))).all())


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("slots", [3, 8, 32])
@pytest.mark.parametrize("policy", ["on-demand", "layer-prefetch", "lru"])
def test_a_needed_copy_that_fails_ends_the_request_and_not_the_next(policy: str, slots: int, phase: Phase) -> None:
    rig = Rig(policy, slots=slots)
    rig.store.fail_on = {ExpertId(2, 5)}
    with pytest.raises(CopyError, match=r"2/5.*injected"):
        rig.run(phase, [ALL] * 4, tokens=100)
    assert_settled(rig)
    rig.store.fail_on = set()
    batches = rig.run(phase, [ALL] * 4, tokens=100)
    assert sum(len(batch.experts) for batch in batches) == 32


def test_the_rest_of_a_batch_that_failed_is_not_lost() -> None:
    rig = Rig(slots=4)
    rig.store.fail_on = {ExpertId(0, 1)}
    with pytest.raises(CopyError):
        rig.run(Phase.DECODE, [[0, 1, 2]], expert_s=9.0)
    assert rig.resident() == {ExpertId(0, 0), ExpertId(0, 2)}


def test_a_failed_guess_that_nobody_needs_is_dropped() -> None:
    rig = Rig(layers=2)
    rig.store.fail_on = {ExpertId(0, 0), ExpertId(0, 1)}
    batches = rig.run(Phase.PREFILL, [[6, 7], ALL], tokens=100, attention_s=2.5)
    assert sum(len(batch.experts) for batch in batches) == 10
    assert_settled(rig)


def test_a_failed_guess_that_is_needed_is_demanded_afresh() -> None:
    rig = Rig(layers=1)
    rig.store.fail_reads = {0, 1}
    batches = rig.run(Phase.PREFILL, [ALL], tokens=100, attention_s=2.5)
    assert sorted(expert for batch in batches for expert in batch.experts) == ALL
    assert [ticket.state for ticket in rig.engine.tickets[:2]] == [TicketState.FAILED] * 2
    assert rig.stats().bytes.demanded == (len(ALL) - 2) * rig.store.layout.slot_bytes


def test_an_error_of_the_consumer_drains_the_link() -> None:
    rig = Rig("layer-prefetch", slots=16)

    def fail(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rig.run(Phase.DECODE, [[1, 2]] * 4, look=fail)
    assert_settled(rig)
    rig.decode([[1, 2]] * 4)


def test_load_all_reports_what_it_cannot_read() -> None:
    rig = Rig("resident", slots=32)
    rig.store.fail_on = {ExpertId(3, 3)}
    with pytest.raises(CopyError, match="3/3"):
        rig.scheduler.load_all()
    assert_settled(rig)
    rig.store.fail_on = set()
    rig.scheduler.load_all()
    assert len(rig.resident()) == 32


def test_an_engine_that_closes_ends_the_request() -> None:
    rig = Rig(slots=8)
    rig.scheduler.begin(Phase.DECODE, 1)
    with pytest.raises(ClosedError), rig.scheduler.acquire(0, [1, 2, 3]) as lease:
        rig.engine.close()
        list(lease)
    with pytest.raises(ClosedError):
        rig.scheduler.acquire(0, [4])
    rig.scheduler.end()
    assert_settled(rig)
