"""What a prefill does when, on a virtual clock: the link never idles, residents go first, the decode cache survives."""

from __future__ import annotations

from collections import Counter

import pytest

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Priority, TicketState
from duoserve.scheduling.prefill import RING_SLOTS
from tests.scheduling.rig import Batch, Rig

ALL = list(range(8))


def busy_share(rig: Rig) -> float:
    """How busy the link was between the first copy and the last."""
    done = rig.done()
    first, last = min(t.started_at or 0.0 for t in done), max(t.finished_at or 0.0 for t in done)
    return rig.stats().transfer_s / (last - first)


@pytest.mark.parametrize("slots", [3, 4, 8, 20, 64])
def test_a_link_bound_prefill_keeps_the_link_busy(slots: int) -> None:
    rig = Rig(layers=8, slots=slots)
    rig.meter.begin_request()
    rig.prefill(attention_s=0.4, expert_s=0.3)
    assert len(rig.done()) == 64  # each expert is copied once
    assert busy_share(rig) >= 0.95


def test_the_link_stays_busy_past_layers_that_are_resident() -> None:
    rig = Rig(layers=8, slots=24)
    for layer in (1, 2, 5):  # the cache holds six experts of three layers, and the prefill takes six other slots
        rig.decode([ALL[:6] if other == layer else [] for other in range(8)])
    rig.engine.tickets.clear()
    rig.meter.begin_request()
    rig.prefill(attention_s=0.4, expert_s=0.3)
    assert len(rig.done()) == 64 - 18
    assert busy_share(rig) >= 0.95


def test_the_first_copies_start_before_the_first_layer_is_routed() -> None:
    rig = Rig()
    rig.prefill(attention_s=2.5)
    assert [ticket.started_at for ticket in rig.engine.tickets[:3]] == [0.0, 1.0, 2.0]
    assert rig.stats().hits["prefill"] >= 2


def test_residents_are_computed_while_the_others_are_copied() -> None:
    rig = Rig(slots=12)
    rig.decode([[6, 2], [], [], []])
    now = rig.clock.now
    batches = rig.run(Phase.PREFILL, [[0, 2, 4, 6]], expert_s=0.75)
    assert batches[0] == Batch(now, 0, [2, 6])
    assert batches[1] == Batch(now + 1.5, 0, [0])  # had arrived half a second earlier
    assert batches[2] == Batch(now + 2.25, 0, [4])


def test_experts_are_computed_in_the_order_they_arrive() -> None:
    rig = Rig(layers=1, slots=9, shuffle=3)
    batches = rig.run(Phase.PREFILL, [ALL], expert_s=0.1)
    arrived = [ticket.expert.expert for ticket in rig.done()]
    assert [expert for batch in batches for expert in batch.experts] == arrived != ALL


def test_a_short_prompt_does_not_speculate() -> None:
    rig = Rig()
    rig.prefill([[1, 3]] * 4, tokens=4, attention_s=3.0)  # 4 of 8 tokens: 68 % of the experts
    assert {ticket.priority for ticket in rig.engine.tickets} == {Priority.DEMAND}
    assert [ticket.expert for ticket in rig.done()] == [ExpertId(layer, e) for layer in range(4) for e in (1, 3)]


def test_wrong_guesses_are_cancelled_while_they_are_queued() -> None:
    rig = Rig(layers=1)
    rig.run(Phase.PREFILL, [[7, 3]], tokens=1000, attention_s=0.5)
    states = {ticket.expert.expert: ticket.state for ticket in rig.engine.tickets}
    # The first of the four guesses runs already, two can still be cancelled, and one is wanted.
    assert states == {
        0: TicketState.DONE,
        1: TicketState.CANCELLED,
        2: TicketState.CANCELLED,
        3: TicketState.DONE,
        7: TicketState.DONE,
    }
    assert rig.stats().bytes.prefetched_late == rig.stats().bytes.demanded == rig.store.layout.slot_bytes


def test_a_guess_that_is_wanted_overtakes_nothing_but_guesses() -> None:
    rig = Rig(layers=2, slots=4)
    rig.prefill(expert_s=0.1)
    first_layer = [ticket.finished_at or 0.0 for ticket in rig.done() if ticket.expert.layer == 0]
    second_layer = [ticket.started_at or 0.0 for ticket in rig.done() if ticket.expert.layer == 1]
    assert max(first_layer) <= min(second_layer)


def fill_cache(rig: Rig) -> set[ExpertId]:
    for step in range(6):
        rig.decode([[step % 8, (step + layer + 1) % 8] for layer in range(4)])
    return rig.resident()


@pytest.mark.parametrize("slots", [3, 5, 8, 16, 30])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_a_prefill_costs_the_decode_cache_no_more_than_its_ring(slots: int, tokens: int) -> None:
    rig = Rig(slots=slots)
    before = fill_cache(rig)
    free = slots - len(before)
    seen: list[set[ExpertId]] = []
    rig.prefill(tokens=tokens, look=lambda _: seen.append(before - rig.resident()))
    lost = max(seen, key=len)
    assert len(lost) == max(0, min(RING_SLOTS, slots, 32 - len(before)) - free)
    assert all(gone <= lost for gone in seen)  # what stayed at the start stayed to the end
    assert len(rig.resident()) == slots  # and what came last stays too


def test_the_ring_is_made_of_what_is_worth_least() -> None:
    rig = Rig(layers=2, slots=8)
    rig.decode([[0, 1, 2, 3], [0, 1, 2, 3]])
    rig.decode([[3, 2], [3, 2]])
    rig.run(Phase.PREFILL, [[], []], tokens=1)
    assert rig.resident() == {ExpertId(layer, e) for layer in (0, 1) for e in (2, 3)}


def test_a_model_that_is_all_in_slots_loses_nothing() -> None:
    rig = Rig(slots=32)
    rig.prefill()
    assert len(rig.done()) == 32
    rig.prefill()
    rig.decode([[0, 1]] * 4)
    assert len(rig.done()) == 32


def test_free_slots_are_filled_evenly_with_the_most_wanted() -> None:
    rig = Rig(slots=18)  # a ring of 4, and 14 to fill
    wanted = [[7, 5, 3, 1, 0, 2, 4, 6], [6, 4, 2, 0, 1, 3, 5, 7]] * 2
    rig.prefill(wanted)
    stayed = [[ExpertId(layer, e) for e in wanted[layer][:quota]] for layer, quota in enumerate([3, 3, 4, 4])]
    kept = {expert for experts in stayed for expert in experts}
    assert kept <= rig.resident()
    assert Counter(expert.layer for expert in rig.resident() - kept) == {3: 4}  # the last to pass the ring


def test_what_a_layer_leaves_of_its_share_goes_to_the_next() -> None:
    rig = Rig(layers=2, slots=12)
    rig.prefill([[3], ALL], tokens=1)
    assert Counter(expert.layer for expert in rig.resident()) == {0: 1, 1: 8}


def test_layers_without_experts_are_passed_over() -> None:
    rig = Rig(layers=4, slots=8, moe_layers=[1, 3])
    rig.meter.begin_request()
    rig.scheduler.begin(Phase.PREFILL, 1000)
    for layer in (1, 3):
        rig.clock.advance(0.4)
        with rig.scheduler.acquire(layer, ALL) as lease:
            for batch in lease:
                rig.clock.advance(0.3 * len(batch))
    rig.scheduler.end()
    assert {ticket.expert.layer for ticket in rig.engine.tickets} == {1, 3}
    assert busy_share(rig) >= 0.95
