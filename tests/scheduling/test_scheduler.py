"""What every policy promises, and what each does differently, on a virtual clock."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from duoserve.config import Phase
from duoserve.errors import ClosedError, IntegrityError, MemoryBudgetError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool, SlotState
from duoserve.experts.streams import Mark
from duoserve.experts.tickets import Priority
from duoserve.metrics import Meter
from duoserve.scheduling.plan import GuessMode, ModelShape
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.scheduler import Scheduler
from tests.experts.test_lane_marks import Clock, Stepping
from tests.experts.test_stream_engine import EXPERTS, PartlyInRam
from tests.helpers.fakes import SMALL
from tests.scheduling.fortune import Teller, certain
from tests.scheduling.rig import Batch, Rig

ALL = list(range(8))
ONE = SMALL.slot_bytes
STREAMING = ["on-demand", "layer-prefetch", "lru"]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("slots", [1, 3, 7, 32])
@pytest.mark.parametrize("policy", STREAMING)
def test_a_layer_goes_through_as_many_experts_as_it_wants(policy: str, slots: int, phase: Phase) -> None:
    rig = Rig(policy, slots=slots)
    routing = [ALL, [5, 1], ALL[::-1], [2, 7, 0]]
    for _ in range(2):
        batches = rig.run(phase, routing, tokens=50, expert_s=0.1)
        for layer, wanted in enumerate(routing):
            got = [expert for batch in batches if batch.layer == layer for expert in batch.experts]
            assert sorted(got) == sorted(wanted)
        assert rig.num_holds() == 0


@pytest.mark.parametrize("policy", STREAMING)
def test_a_batch_is_held_until_the_next_is_asked_for(policy: str) -> None:
    rig = Rig(policy, slots=3)
    rig.scheduler.begin(Phase.DECODE, 1)
    with rig.scheduler.acquire(0, ALL) as lease:
        for ready in lease:
            assert rig.num_holds() == len(ready)
            for expert, slot in ready:
                assert rig.table.expert_in(slot) == (0, expert) and rig.table.holds(slot) == 1
    rig.scheduler.end()


@pytest.mark.parametrize("policy", STREAMING)
def test_leaving_a_lease_early_leaves_no_hold(policy: str) -> None:
    rig = Rig(policy, slots=5)
    rig.decode([ALL] * 4)
    rig.scheduler.begin(Phase.DECODE, 1)
    with pytest.raises(ZeroDivisionError), rig.scheduler.acquire(0, ALL) as lease:
        next(iter(lease))
        raise ZeroDivisionError
    assert rig.num_holds() == 0
    rig.scheduler.end()
    assert rig.num_states(SlotState.LOADING) == 0
    rig.decode([ALL] * 4)


@pytest.mark.parametrize("policy", STREAMING)
def test_end_releases_a_lease_that_nobody_closed(policy: str) -> None:
    rig = Rig(policy, slots=5)
    rig.scheduler.begin(Phase.DECODE, 1)
    lease = rig.scheduler.acquire(0, [1, 2, 3])
    next(iter(lease))
    rig.scheduler.end()
    assert rig.num_holds() == 0 and rig.num_states(SlotState.LOADING) == 0
    lease.close()


def test_hits_and_misses_are_counted_by_phase() -> None:
    rig = Rig(slots=32)
    rig.prefill([[0, 1, 2], [0], [], []], tokens=1)
    rig.decode([[0, 5], [1, 0], [], []])
    stats = rig.stats()
    assert (stats.hits, stats.misses) == ({"prefill": 0, "decode": 2}, {"prefill": 4, "decode": 2})


class TestLru:
    def test_misses_are_under_way_before_the_residents_are_computed(self) -> None:
        rig = Rig(layers=1, slots=4)
        rig.decode([[1, 2]])
        now = rig.clock.now
        batches = rig.decode([[3, 1, 0, 2]], expert_s=0.5)
        assert batches == [Batch(now, 0, [1, 2]), Batch(now + 1, 0, [3]), Batch(now + 2, 0, [0])]

    def test_it_prefetches_nothing(self) -> None:
        rig = Rig(slots=32)
        rig.decode([[1, 2]] * 4, attention_s=9.0)
        assert len(rig.done()) == len(rig.engine.tickets) == 8

    def test_every_miss_is_admitted(self) -> None:
        rig = Rig(slots=9)
        for step in range(8):
            rig.decode([[step, (step + 3) % 8]] * 4)
            assert {ExpertId(3, step), ExpertId(3, (step + 3) % 8)} <= rig.resident()

    def test_all_bytes_are_demanded_and_stalls_are_timed(self) -> None:
        rig = Rig(slots=8)
        rig.meter.begin_request()
        rig.decode([[1, 2]] * 4, attention_s=0.5, expert_s=0.25)
        stats = rig.stats()
        assert stats.bytes.demanded == stats.bytes.total == 8 * ONE
        # A layer: half a second of attention, then one of waiting; a quarter of computing goes on during the copies.
        assert stats.stall_s == pytest.approx(4 * 1.75) and stats.overlap_s == pytest.approx(4 * 0.25)
        assert stats.compute_s + stats.stall_s == pytest.approx(stats.wall_s)
        assert stats.compute_s + stats.transfer_s - stats.overlap_s == pytest.approx(stats.wall_s)


class TestOnDemand:
    def test_copies_and_computation_alternate(self) -> None:
        rig = Rig("on-demand", slots=8)
        rig.meter.begin_request()
        batches = rig.decode([[1, 2]] * 4, attention_s=0.5, expert_s=0.25)
        assert batches[0] == Batch(2.5, 0, [1, 2]) and len(batches) == 4
        assert rig.stats().overlap_s == 0.0

    def test_with_guesses_too_a_layer_is_computed_when_all_have_come(self) -> None:
        guessing = replace(get_policy("on-demand"), guesses=GuessMode.TOP_K)
        rig = Rig(guessing, slots=8, predictor=Teller(lambda layer: certain(8, [6, 7])))
        assert [batch.experts for batch in rig.decode([[1, 2]] * 4)] == [[1, 2]] * 4

    def test_nothing_is_kept(self) -> None:
        rig = Rig("on-demand", slots=32)
        rig.prefill()
        assert rig.resident() == set()
        rig.decode([[1, 2]] * 4)
        assert rig.stats().hit_rate() == 0.0


class TestLayerPrefetch:
    def test_the_next_layer_is_copied_meanwhile_and_wraps_around(self) -> None:
        rig = Rig("layer-prefetch", slots=16)
        for _ in range(3):
            rig.decode([[1, 2]] * 4, attention_s=5.0, expert_s=5.0)
        assert rig.stats().hits["decode"] == 3 * 8
        assert {ticket.expert.layer for ticket in rig.engine.tickets[-8:]} == {0}
        rig.scheduler.begin(Phase.DECODE, 1)
        with rig.scheduler.acquire(0, [1, 2]) as lease:
            list(lease)
        assert {expert.layer for expert in rig.resident()} <= {0, 1}  # of the other layers nothing is left
        rig.scheduler.end()

    def test_wrong_guesses_do_not_turn_into_a_cache(self) -> None:
        rig = Rig("layer-prefetch", slots=32)
        for _ in range(3):
            rig.decode([[1, 2]] * 4, attention_s=9.0)
        assert len(rig.done()) == 3 * 32

    def test_demands_go_before_the_guesses_for_the_next_layer(self) -> None:
        rig = Rig("layer-prefetch", slots=16)
        rig.scheduler.begin(Phase.PREFILL, 1)
        with rig.scheduler.acquire(1, [6, 7]) as lease:
            list(lease)
        guesses = [ticket for ticket in rig.engine.tickets if ticket.expert.layer == 2]
        # One of the guesses for layer 0 ran already; the demands come next, and then those for layer 2.
        assert [ticket.expert for ticket in rig.done()] == [ExpertId(0, 0), ExpertId(1, 6), ExpertId(1, 7)]
        assert len(guesses) == 8 and all(ticket.priority is Priority.PREFETCH for ticket in guesses)
        rig.scheduler.end()

    def test_bytes_by_class(self) -> None:
        rig = Rig("layer-prefetch", layers=2, slots=16)
        rig.run(Phase.PREFILL, [[0, 7], [3]], attention_s=1.5, expert_s=0.0)
        # Layer 0: expert 0 has arrived, 1 runs and will be wasted, 7 is queued and overtakes the rest, which is
        # cancelled. Layer 1: half a second after 7 came, its 0 to 2 are wasted (0 has come, 1 runs), 3 comes late.
        counts = rig.stats().bytes
        assert (counts.prefetched_useful, counts.prefetched_late, counts.demanded) == (ONE, 2 * ONE, 0)
        rig.decode([[], []])
        assert rig.stats().bytes.wasted == (len(rig.done()) - 3 - len(rig.resident())) * ONE

    @pytest.mark.parametrize("later", [0.0, 9.0], ids=["queued", "arrived"])
    def test_guesses_make_way_for_a_demand(self, later: float) -> None:
        rig = Rig("layer-prefetch", slots=2)
        rig.scheduler.begin(Phase.PREFILL, 1)
        for wanted in ([0, 1], [2]):  # the same layer again, when guesses for the next are in both slots
            with rig.scheduler.acquire(0, wanted) as lease:
                assert [one.expert for ready in lease for one in ready] == wanted
            rig.clock.advance(later)
        rig.scheduler.end()

    def test_a_guess_that_is_wanted_is_one_no_more(self) -> None:
        rig = Rig("layer-prefetch", slots=16)
        rig.scheduler.begin(Phase.DECODE, 1)
        rig.scheduler.acquire(0, [5, 6])
        promoted = [t.expert for t in rig.engine.tickets if t.priority is Priority.DEMAND]
        assert promoted == [ExpertId(0, 5), ExpertId(0, 6)]
        rig.scheduler.end()


class TestResident:
    def test_all_experts_are_loaded_once_and_nothing_ever_waits(self) -> None:
        rig = Rig("resident", slots=32)
        rig.scheduler.load_all()
        assert len(rig.resident()) == 32
        rig.meter.begin_request()
        rig.prefill(expert_s=0.1)
        rig.decode([[1, 2]] * 4)
        stats = rig.stats()
        assert len(rig.done()) == 32 and stats.stall_s == 0.0
        assert stats.hit_rate() == 1.0 and stats.bytes.total == 0

    def test_what_stays_for_good_is_not_held_and_still_leased_once_at_a_time(self) -> None:
        rig = Rig("resident", slots=32)
        rig.scheduler.load_all()
        rig.scheduler.begin(Phase.DECODE, 1)
        with rig.scheduler.acquire(0, [2, 1]) as lease:
            with pytest.raises(IntegrityError, match="while another lease was open"):
                rig.scheduler.acquire(1, [1])
            assert [one.expert for one in lease.at_once()] == [2, 1]
            assert not any(map(rig.table.holds, range(32)))
            assert list(lease) == []
        for layer in (1, 2, 3):
            slots = [rig.table.slot_of(ExpertId(layer, expert)) for expert in (5, 6)]
            with rig.scheduler.acquire(layer, [5, 6]) as lease:
                assert list(lease) == [list(zip((5, 6), slots, strict=True))]
        rig.scheduler.end()
        rig.scheduler.check_integrity()
        assert rig.stats().hits["decode"] == 8

    def test_a_lease_of_what_stays_that_was_given_up_lets_the_next_one_be(self) -> None:
        rig = Rig("resident", slots=32)
        rig.scheduler.load_all()
        rig.scheduler.begin(Phase.DECODE, 1)
        with rig.scheduler.acquire(0, [2, 1]):
            pass
        rig.scheduler.acquire(0, [2, 1])
        rig.scheduler.end()
        rig.scheduler.begin(Phase.DECODE, 1)
        with rig.scheduler.acquire(0, [4, 3]) as lease:
            assert [ready.expert for batch in lease for ready in batch] == [4, 3]
        rig.scheduler.end()

    @pytest.mark.parametrize("keeps_up", [True, False], ids=["device keeps up", "device lags behind"])
    def test_what_the_device_waited_for_while_all_were_loaded_is_no_stall_of_a_pass(self, keeps_up: bool) -> None:
        class Device(Clock):
            def passed(self, mark: Mark) -> bool:
                if keeps_up:
                    self.finish()
                return super().passed(mark)

        streams, told = Device(), list[tuple[float, float]]()
        meter, pool = Meter(lambda: float(streams.steps)), SlotPool(8, SMALL)

        def stalled(started: float, finished: float) -> None:
            told.append((started, finished))
            meter.stalled(started, finished)

        engine = Stepping(PartlyInRam(EXPERTS), pool, streams, on_copied=meter.copied, on_stalled=stalled)
        scheduler = Scheduler(ModelShape(8, 2, (0,)), pool, engine, get_policy("resident"), meter)
        with closing(scheduler):
            scheduler.load_all()
            assert (len(told) == 8) is keeps_up
            streams.finish()
            meter.begin_request()
            with meter.compute():
                scheduler.begin(Phase.DECODE, 1)
                with scheduler.acquire(0, [1, 2]) as lease:
                    assert len(list(lease)) == 1
                    streams.run(lambda: None)
                    streams.finish()
                scheduler.end()
            meter.end_request()
            stats = meter.snapshot()
        assert len(told) == 8 and all(started < finished for started, finished in told)
        assert stats.stall_s == stats.transfer_s == 0.0 and 0 < stats.compute_s == stats.wall_s

    def test_too_few_slots_are_refused(self) -> None:
        with pytest.raises(
            MemoryBudgetError, match=r"all 32 experts in slots \(4 layers x 8\), but there are 31 slots"
        ):
            Rig("resident", slots=31)

    def test_layers_without_experts_need_no_slots(self) -> None:
        rig = Rig("resident", slots=16, moe_layers=[1, 2])
        rig.scheduler.load_all()
        assert {expert.layer for expert in rig.resident()} == {1, 2}


def test_misuse_is_a_bug_that_shows() -> None:
    rig = Rig()
    with pytest.raises(IntegrityError, match="outside of a forward pass"):
        rig.scheduler.acquire(0, [1])
    rig.scheduler.begin(Phase.DECODE, 1)
    for call in (lambda: rig.scheduler.begin(Phase.DECODE, 1), rig.scheduler.load_all):
        with pytest.raises(IntegrityError, match="before the last forward pass ended"):
            call()
    rig.scheduler.acquire(0, [1])
    with pytest.raises(IntegrityError, match="another lease was open"):
        rig.scheduler.acquire(1, [1])
    rig.scheduler.end()
    rig.scheduler.end()


def test_close_ends_the_pass_and_cannot_be_undone() -> None:
    rig = Rig("layer-prefetch", slots=16)
    rig.scheduler.begin(Phase.PREFILL, 1)
    rig.scheduler.acquire(0, [1, 2])
    rig.scheduler.close()
    rig.scheduler.close()
    rig.table.check_integrity()
    assert rig.num_holds() == rig.num_states(SlotState.LOADING) == 0
    for call in (lambda: rig.scheduler.begin(Phase.DECODE, 1), lambda: rig.scheduler.acquire(0, [1])):
        with pytest.raises(ClosedError):
            call()
