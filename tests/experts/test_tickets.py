"""The order of the queue, piece by piece."""

from __future__ import annotations

import random

import pytest

from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import CopyPiece, Priority, Ticket, TicketQueue

DEMAND, PREFETCH = Priority


def queue_of(*tickets: Ticket, piece_bytes: int | None = 4) -> TicketQueue:
    queue = TicketQueue(piece_bytes)
    for ticket in tickets:
        queue.push(ticket)
    return queue


def ticket(priority: Priority, nbytes: int = 10, slot: int = 0) -> Ticket:
    return Ticket(ExpertId(0, slot), slot, priority, nbytes, 0.0)


def take_all(queue: TicketQueue) -> list[CopyPiece]:
    pieces = []
    while (piece := queue.take()) is not None:
        pieces.append(piece)
    return pieces


def test_a_prefetch_goes_in_pieces_and_a_demand_in_one() -> None:
    guess, demand = ticket(PREFETCH), ticket(DEMAND)
    pieces = take_all(queue_of(guess, demand))
    assert pieces == [(demand, 0, 10), (guess, 0, 4), (guess, 4, 8), (guess, 8, 10)]
    assert [(piece.nbytes, piece.is_first, piece.is_last) for piece in pieces] == [
        (10, True, True),
        (4, True, False),
        (4, False, False),
        (2, False, True),
    ]


@pytest.mark.parametrize(("nbytes", "sizes"), [(0, [0]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_the_pieces_of_a_ticket_are_all_of_it(nbytes: int, sizes: list[int]) -> None:
    pieces = take_all(queue_of(ticket(PREFETCH, nbytes)))
    assert [piece.nbytes for piece in pieces] == sizes
    assert [piece.is_last for piece in pieces] == [False] * (len(sizes) - 1) + [True]


def test_without_a_size_a_prefetch_goes_whole() -> None:
    assert [piece.nbytes for piece in take_all(queue_of(ticket(PREFETCH), piece_bytes=None))] == [10]


@pytest.mark.parametrize("size", [0, -1])
def test_pieces_have_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="never come to an end"):
        TicketQueue(size)


def test_a_demand_goes_between_two_pieces_and_the_guess_goes_on_before_later_ones() -> None:
    first, second, demand = ticket(PREFETCH), ticket(PREFETCH), ticket(DEMAND)
    queue = queue_of(first, second)
    assert queue.take() == (first, 0, 4)
    queue.push(demand)
    assert [piece.ticket for piece in take_all(queue)] == [demand, first, first, second, second, second]


def test_what_is_left_of_a_promoted_prefetch_is_one_piece() -> None:
    guess, demand = ticket(PREFETCH), ticket(DEMAND)
    queue = queue_of(guess)
    queue.take()
    queue.push(demand)
    queue.promote(guess)
    assert take_all(queue) == [(demand, 0, 10), (guess, 4, 10)]


def test_a_ticket_can_be_taken_out_until_its_last_piece_is_taken() -> None:
    guess = ticket(PREFETCH)
    queue = queue_of(guess)
    queue.take()
    assert queue.discard(guess) and guess.sent == 4 and queue.take() is None
    guess = ticket(PREFETCH)
    queue = queue_of(guess)
    assert len(take_all(queue)) == 3
    assert not queue.discard(guess)
    queue.promote(guess)
    assert guess.priority is PREFETCH and guess.sent == 10


def test_who_may_not_start_is_passed_over() -> None:
    read, guess, later = ticket(DEMAND, slot=1), ticket(PREFETCH, slot=2), ticket(DEMAND, slot=3)
    queue = queue_of(read, guess, later)
    order = [queue.take(lambda ticket: ticket is not read) for _ in range(2)]
    assert [piece and piece.ticket for piece in order] == [later, guess]
    assert queue.take(lambda ticket: False) is None and list(queue) == [read, guess]


def test_a_draw_takes_pieces_of_all_that_may_start() -> None:
    rng, guess, demand, read = random.Random(0), ticket(PREFETCH), ticket(DEMAND), ticket(DEMAND)
    drawn = set()
    for _ in range(50):
        guess.sent = demand.sent = 0
        drawn.add(queue_of(guess, demand, read).draw(rng, lambda ticket: ticket is not read))
    assert drawn == {(guess, 0, 4), (demand, 0, 10)}
    assert TicketQueue().draw(rng) is None


def test_clearing_gives_back_all_in_the_order_of_their_turns() -> None:
    guess, demand = ticket(PREFETCH), ticket(DEMAND)
    queue = queue_of(guess, demand)
    assert len(queue) == 2 and queue.clear() == [demand, guess]
    assert len(queue) == 0 and queue.clear() == []


def test_what_has_not_begun_can_be_withdrawn_wherever_it_is() -> None:
    queued, elsewhere, begun, taken = (ticket(PREFETCH) for _ in range(4))
    queue = queue_of(begun, taken, queued)
    begun.start(0.0)
    queue.take()
    queue.promote(taken)
    queue.take()
    taken.start(0.0)
    assert [queue.withdraw(one) for one in (queued, elsewhere, begun, taken)] == [True, True, True, False]
    assert not list(queue)
