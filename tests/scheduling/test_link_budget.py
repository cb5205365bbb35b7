"""What pays: by hand-made links and records."""

from __future__ import annotations

import pytest

from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Priority, Ticket
from duoserve.scheduling.link_budget import MIN_CHANCE, Calibration, Demand, Guess, IdleLink, affordable


def demand(wanted: int, copies: int) -> Demand:
    return Demand(wanted, copies, copies, alone=True)


def arrived(link: IdleLink, start: float, stop: float, priority: Priority = Priority.DEMAND) -> None:
    ticket = Ticket(ExpertId(0, 0), 0, priority, 1, start)
    ticket.start(start)
    ticket.finish(stop)
    link.arrived(ticket, asked=priority is Priority.DEMAND)


FREE = (0.0, 0.0)


class TestCalibration:
    def test_a_new_predictor_is_taken_at_its_word(self) -> None:
        assert Calibration().chance(0.72) == pytest.approx(0.75)

    def test_a_liar_is_not_believed_and_believed_again_once_it_speaks_true(self) -> None:
        record = Calibration()
        for _ in range(60):
            record.note(0.9, False)
        assert record.chance(0.9) < MIN_CHANCE
        assert record.chance(0.5) == pytest.approx(0.55)
        for _ in range(300):
            record.note(0.9, True)
        assert record.chance(0.9) > 0.9

    def test_certainty_has_a_place(self) -> None:
        record = Calibration()
        record.note(1.0, True)
        assert 0.95 < record.chance(1.0) <= 1.0


class TestIdleLink:
    def test_it_is_idle_from_the_last_arrival_until_the_next_routing(self) -> None:
        link = IdleLink(3, 16)
        link.routed(0, 10.0)
        link.demanded(demand(2, 2))
        arrived(link, 10.0, 11.0)
        arrived(link, 11.0, 12.5)
        link.routed(1, 15.0)
        assert link.copy_s == pytest.approx(1.05)
        link.routed(0, 20.0)
        link.demanded(demand(2, 1))
        assert link.idle_before(1) == pytest.approx(2.5)

    def test_after_a_layer_without_misses_it_was_idle_all_the_time(self) -> None:
        link = IdleLink(2, 16)
        for at, misses in ((0.0, 1), (10.0, 0)):
            link.routed(0, at)
            link.demanded(demand(2, misses))
            if misses:
                arrived(link, at, at + 3)
            link.routed(1, at + 4)
        link.demanded(demand(2, 0))
        link.routed(0, 20.0)
        link.demanded(demand(2, 0))
        assert link.idle_before(1) == 4.0
        link.demanded(demand(2, 5))
        assert link.idle_before(1) == 1.0

    def test_prefetches_are_no_demands_and_what_a_pause_covers_is_not_measured(self) -> None:
        link = IdleLink(2, 16)
        link.routed(0, 0.0)
        arrived(link, 0.0, 5.0, Priority.PREFETCH)
        assert link.copy_s is None
        link.pause()
        link.routed(1, 99.0)
        assert link.idle_before(1) == 0.0


class TestAffordable:
    """Of victims that nobody misses, but for the last test."""

    GUESSES = ((0, Guess(7, 0.9)), (0, Guess(3, 0.6)), (0, Guess(5, 0.3)), (1, Guess(2, 0.5)))

    def test_what_fits_into_the_idle_time_pays_if_it_is_likely_at_all(self) -> None:
        assert affordable(self.GUESSES, 4.0, 1.0, 0, FREE) == list(self.GUESSES)
        assert affordable([(0, Guess(1, MIN_CHANCE - 0.01))], 9.0, 1.0, 0, FREE) == []

    def test_what_the_routing_would_interrupt_must_be_the_likelier_the_more_is_left(self) -> None:
        assert [guess.expert for _, guess in affordable(self.GUESSES, 1.5, 1.0, 0, FREE)] == [7, 3]
        assert [guess.expert for _, guess in affordable(self.GUESSES, 1.3, 1.0, 0, FREE)] == [7]
        assert affordable(self.GUESSES, 0.05, 1.0, 0, FREE) == []

    def test_what_is_queued_goes_before(self) -> None:
        assert [guess.expert for _, guess in affordable(self.GUESSES, 3.0, 1.0, 2, FREE)] == [7]

    def test_a_later_layers_guess_must_not_delay_the_next_layers_demands(self) -> None:
        assert [guess.expert for _, guess in affordable(self.GUESSES, 3.4, 1.0, 0, FREE)] == [7, 3, 5]
        assert affordable([(1, Guess(2, 0.5))], 0.4, 1.0, 0, FREE) == []

    def test_a_victim_that_is_missed_is_a_price_too(self) -> None:
        assert affordable([(0, Guess(7, 0.45))], 9.0, 1.0, 0, [0.5]) == [(0, Guess(7, 0.45))]
        assert affordable([(0, Guess(7, 0.45))], 9.0, 1.0, 0, [1.0]) == []


def test_slots_are_used_the_more_often_the_fewer_there_are() -> None:
    link = IdleLink(1, 16)
    assert link.use_chance(4) == 0.0
    link.routed(0, 0.0)
    link.demanded(demand(5, 2))
    assert (link.use_chance(12), link.use_chance(2)) == (0.25, 1.0)
