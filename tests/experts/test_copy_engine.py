"""Copies by host threads: who goes first, who is told, and that no fault of one copy is another's."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from duoserve.errors import ClosedError, ConfigError, CopyError
from duoserve.experts.copy_engine import ThreadedCopyEngine
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.tickets import Priority, Ticket, TicketState
from tests.helpers.fakes import PATIENCE_S, SMALL, ArrayStore
from tests.helpers.live_threads import threads_since

DEMAND, PREFETCH = Priority
EXPERTS = [ExpertId(0, e) for e in range(8)]


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """A wake-up that got lost fails its test instead of hanging it."""

    def give_up(*args: object) -> None:
        raise TimeoutError("a thread waits for ever")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def store() -> ArrayStore:
    return ArrayStore(num_layers=1, num_experts=8)


@pytest.fixture
def pool() -> SlotPool:
    return SlotPool(8, SMALL, poison=True)


@pytest.fixture
def engine(store: ArrayStore, pool: SlotPool) -> Iterator[ThreadedCopyEngine]:
    """One thread, so that the order of the copies is the order of the queue."""
    with_one = ThreadedCopyEngine(store, pool, num_threads=1)
    yield with_one
    with_one.close()


def submit(engine: ThreadedCopyEngine, number: int, priority: Priority = DEMAND) -> Ticket:
    """A copy of expert ``number`` into the slot of the same number."""
    return engine.submit(EXPERTS[number], number, priority)


def wait_all(engine: ThreadedCopyEngine, tickets: list[Ticket]) -> None:
    while unfinished := [ticket for ticket in tickets if not ticket.finished]:
        engine.wait(unfinished)


class Watched(list[Ticket]):
    """Tickets that tell when an engine has looked at them: it does so under its lock, before it goes to sleep."""

    def __init__(self, *tickets: Ticket) -> None:
        super().__init__(tickets)
        self.seen = threading.Event()

    def __iter__(self) -> Iterator[Ticket]:
        self.seen.set()
        return super().__iter__()

    def wait_seen(self) -> None:
        assert self.seen.wait(PATIENCE_S)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> bool:
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def test_a_copy_brings_the_bytes_and_its_ticket_says_when(
    engine: ThreadedCopyEngine, store: ArrayStore, pool: SlotPool
) -> None:
    before = engine.now()
    ticket = engine.submit(EXPERTS[3], 5, DEMAND)
    assert engine.wait([ticket]) == [ticket]
    assert ticket.state is TicketState.DONE and ticket.finished and ticket.error is None
    assert (ticket.expert, ticket.slot, ticket.priority) == (EXPERTS[3], 5, DEMAND)
    assert ticket.nbytes == SMALL.slot_bytes
    assert torch.equal(pool.row(5), store.row(EXPERTS[3]))
    assert pool.weights.w2_SHI[4].isnan().all()
    assert ticket.issued_at is not None and ticket.started_at is not None and ticket.finished_at is not None
    assert before <= ticket.issued_at <= ticket.started_at <= ticket.finished_at <= engine.now()


def test_demands_go_first_and_each_kind_in_order(engine: ThreadedCopyEngine, store: ArrayStore) -> None:
    gate = store.gate(EXPERTS[0])
    tickets = [submit(engine, 0)]
    gate.wait_entered()
    assert tickets[0].state is TicketState.RUNNING
    tickets += [submit(engine, number, PREFETCH if number in (1, 2) else DEMAND) for number in (1, 2, 3, 4)]
    assert {ticket.state for ticket in tickets[1:]} == {TicketState.QUEUED}
    gate.open()
    wait_all(engine, tickets)
    assert store.reads == [EXPERTS[number] for number in (0, 3, 4, 1, 2)]


def test_a_promoted_prefetch_is_the_last_of_the_demands(engine: ThreadedCopyEngine, store: ArrayStore) -> None:
    gate = store.gate(EXPERTS[0])
    running = submit(engine, 0, PREFETCH)
    gate.wait_entered()
    tickets = [submit(engine, 1, PREFETCH), submit(engine, 2, PREFETCH), submit(engine, 3)]
    engine.promote(tickets[1])
    engine.promote(running)
    engine.promote(tickets[2])
    tickets.append(submit(engine, 4))
    gate.open()
    wait_all(engine, [running, *tickets])
    engine.promote(tickets[0])
    assert store.reads == [EXPERTS[number] for number in (0, 3, 2, 4, 1)]
    assert [ticket.priority for ticket in (running, *tickets)] == [PREFETCH, PREFETCH, DEMAND, DEMAND, DEMAND]


def test_only_queued_copies_can_be_cancelled(engine: ThreadedCopyEngine, store: ArrayStore, pool: SlotPool) -> None:
    gate = store.gate(EXPERTS[0])
    running, queued, kept = submit(engine, 0), submit(engine, 1, PREFETCH), submit(engine, 2)
    gate.wait_entered()
    assert not engine.cancel(running)
    assert engine.cancel(queued)
    assert not engine.cancel(queued)
    assert queued.state is TicketState.CANCELLED and queued.finished and queued.finished_at is not None
    assert engine.wait([running, queued]) == [queued]
    gate.open()
    wait_all(engine, [running, kept])
    assert not engine.cancel(kept)
    assert store.reads == [EXPERTS[0], EXPERTS[2]]
    assert pool.weights.w2_SHI[1].isnan().all()


def test_cancelling_wakes_who_waits_for_it(engine: ThreadedCopyEngine, store: ArrayStore) -> None:
    gate = store.gate(EXPERTS[0])
    submit(engine, 0)
    gate.wait_entered()
    queued = Watched(submit(engine, 1))
    waiter = in_background(lambda: engine.wait(queued))
    queued.wait_seen()
    assert engine.cancel(queued[0])
    assert joined(waiter)
    gate.open()


def test_waiting_for_nothing_or_the_past_returns_at_once(engine: ThreadedCopyEngine, store: ArrayStore) -> None:
    assert engine.wait([]) == []
    first, second = submit(engine, 0), submit(engine, 1)
    wait_all(engine, [first, second])
    gate = store.gate(EXPERTS[2])
    third = submit(engine, 2)
    assert engine.wait([second, third, first]) == [second, first]
    gate.open()


def test_wait_blocks_until_a_copy_finishes(engine: ThreadedCopyEngine, store: ArrayStore) -> None:
    gate = store.gate(EXPERTS[0])
    running = Watched(submit(engine, 0))
    gate.wait_entered()
    returned: list[list[Ticket]] = []
    waiter = in_background(lambda: returned.append(engine.wait(running)))
    running.wait_seen()
    assert not returned
    gate.open()
    assert joined(waiter) and returned == [running]


def test_a_slow_copy_does_not_hold_up_the_other_threads(store: ArrayStore, pool: SlotPool) -> None:
    engine = ThreadedCopyEngine(store, pool, num_threads=2)
    gate = store.gate(EXPERTS[0])
    slow, fast = submit(engine, 0), submit(engine, 1)
    assert engine.wait([slow, fast]) == [fast]
    gate.open()
    engine.close()
    assert slow.state is TicketState.DONE


@pytest.mark.parametrize("error", [lambda: OSError(5, "injected"), lambda: SystemExit("injected")])
def test_whatever_a_read_raises_fails_its_ticket_only(error: Callable[[], BaseException], pool: SlotPool) -> None:
    store = ArrayStore(num_layers=1, num_experts=8, fail_on=[EXPERTS[1]], error=error)
    engine = ThreadedCopyEngine(store, pool, num_threads=1)
    bad, good = submit(engine, 1), submit(engine, 2)
    wait_all(engine, [bad, good])
    engine.close()
    assert bad.state is TicketState.FAILED and bad.finished
    assert isinstance(bad.error, CopyError) and "expert 0/1" in str(bad.error) and "injected" in str(bad.error)
    assert type(bad.error.__cause__) is type(error())
    assert good.state is TicketState.DONE and torch.equal(pool.row(2), store.row(EXPERTS[2]))


def test_a_copy_error_is_passed_on_as_it_is(pool: SlotPool) -> None:
    error = CopyError("the disk is gone")
    store = ArrayStore(num_layers=1, num_experts=8, fail_reads=[0], error=lambda: error)
    engine = ThreadedCopyEngine(store, pool)
    ticket = submit(engine, 1)
    engine.wait([ticket])
    engine.close()
    assert ticket.error is error


def test_successful_copies_are_reported_before_they_are_done(pool: SlotPool) -> None:
    store = ArrayStore(num_layers=1, num_experts=8, fail_on=[EXPERTS[1]])
    copies: list[tuple[float, float, int]] = []
    engine = ThreadedCopyEngine(store, pool, 1, on_copied=lambda *copy: copies.append(copy))
    tickets = [submit(engine, number) for number in (0, 1)]
    wait_all(engine, tickets)
    engine.close()
    [(started, finished, nbytes)] = copies
    assert tickets[0].finished_at is not None
    assert tickets[0].issued_at <= started <= finished <= tickets[0].finished_at
    assert nbytes == SMALL.slot_bytes


def test_a_listener_that_fails_does_not_end_the_thread(store: ArrayStore, pool: SlotPool) -> None:
    def fail(started: float, finished: float, nbytes: int) -> None:
        raise ValueError("injected")

    engine = ThreadedCopyEngine(store, pool, 1, on_copied=fail)
    tickets = [submit(engine, 0), submit(engine, 1)]
    wait_all(engine, tickets)
    engine.close()
    assert [ticket.state for ticket in tickets] == [TicketState.FAILED] * 2


def test_close_cancels_the_queue_and_waits_for_the_running_copy(store: ArrayStore, pool: SlotPool) -> None:
    engine = ThreadedCopyEngine(store, pool, num_threads=1)
    gate = store.gate(EXPERTS[0])
    running, queued = submit(engine, 0), Watched(submit(engine, 1))
    gate.wait_entered()
    waiter = in_background(lambda: engine.wait(queued))
    queued.wait_seen()
    closer = in_background(engine.close)
    assert joined(waiter) and queued[0].state is TicketState.CANCELLED
    assert closer.is_alive() and running.state is TicketState.RUNNING
    with pytest.raises(ClosedError, match="expert 0/2"):
        submit(engine, 2)
    gate.open()
    assert joined(closer) and running.state is TicketState.DONE
    assert torch.equal(pool.row(0), store.row(EXPERTS[0])) and store.reads == [EXPERTS[0]]


def test_close_ends_the_threads_and_may_be_called_again(store: ArrayStore, pool: SlotPool) -> None:
    started = threads_since()
    engine = ThreadedCopyEngine(store, pool, num_threads=3)
    submit(engine, 0)
    assert started() == 3
    engine.close()
    engine.close()
    assert started() == 0
    assert engine.wait([]) == []


def test_an_engine_without_threads_is_refused(store: ArrayStore, pool: SlotPool) -> None:
    with pytest.raises(ConfigError, match="copy_threads is 0"):
        ThreadedCopyEngine(store, pool, num_threads=0)


def test_many_copies_from_many_threads_all_arrive() -> None:
    """Each of 8 clients uses its own slots; submits, promotes, cancels and waits interleave as they happen to."""
    store = ArrayStore(num_layers=8, num_experts=16)
    pool = SlotPool(32, SMALL, poison=True)
    reported: list[int] = []
    engine = ThreadedCopyEngine(store, pool, num_threads=8, on_copied=lambda _s, _f, nbytes: reported.append(nbytes))
    wrong: list[Ticket] = []
    done: list[Ticket] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(25):
            tickets = [
                engine.submit(rng.choice(store.experts), slot, rng.choice(list(Priority)))
                for slot in range(4 * number, 4 * number + 4)
            ]
            engine.promote(rng.choice(tickets))
            engine.cancel(rng.choice(tickets))
            wait_all(engine, tickets)
            for ticket in tickets:
                if ticket.state is TicketState.DONE:
                    done.append(ticket)
                    if not torch.equal(pool.row(ticket.slot), store.row(ticket.expert)):
                        wrong.append(ticket)

    clients = [in_background(lambda number=number: client(number)) for number in range(8)]
    assert all(joined(thread) for thread in clients)
    engine.close()
    assert not wrong
    assert len(done) == len(reported) == len(store.reads) >= 8 * 25 * 3


def test_a_trivial_copy_takes_little_time(engine: ThreadedCopyEngine) -> None:
    def round_trip() -> float:
        started = time.perf_counter()
        engine.wait([submit(engine, 0)])
        return time.perf_counter() - started

    assert min(round_trip() for _ in range(200)) < 2e-3  # a wait that polls takes longer, however idle the machine is


def test_idle_threads_end_and_the_next_copy_starts_others(
    store: ArrayStore, pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duoserve.experts.copy_engine.IDLE_SECONDS", 0.5)
    started = threads_since()
    engine = ThreadedCopyEngine(store, pool, num_threads=2)
    for number in (0, 1):
        ticket = submit(engine, number)
        assert started() == 2
        wait_all(engine, [ticket])
        assert ticket.state is TicketState.DONE
        while started():
            time.sleep(0.01)
    engine.close()


@pytest.mark.parametrize("allowed", [0, 1])
def test_threads_that_cannot_be_started(
    allowed: int, store: ArrayStore, pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is enough. Without any the copy is refused, and the next is made if threads can be had by then."""
    start, left = threading.Thread.start, [allowed]

    def limited(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    engine = ThreadedCopyEngine(store, pool, num_threads=2)
    if not allowed:
        with pytest.raises(CopyError, match="can't start new thread"):
            submit(engine, 0)
        left[0] = 2
    ticket = submit(engine, 1)
    wait_all(engine, [ticket])
    assert ticket.state is TicketState.DONE and store.reads == [EXPERTS[1]]
    engine.close()
