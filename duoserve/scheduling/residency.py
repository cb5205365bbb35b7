"""Which expert is in which slot and what is on its way: the slot table, the pool and the copy engine, kept in step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import NamedTuple

from duoserve.experts.copy_engine import CopyEngine
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool, SlotTable
from duoserve.experts.tickets import Priority, Ticket, TicketState
from duoserve.metrics import Meter
from duoserve.scheduling.ledger import Ledger
from duoserve.scheduling.link_budget import IdleLink
from duoserve.scheduling.source import ReadyExpert


class _Made(NamedTuple):
    """A copy that has been collected; ``asked``: a layer had asked for its expert then."""

    ticket: Ticket
    asked: bool


class Residency:
    """Carries out what the scheduler has decided. Nothing else changes what is in the slots.

    ``link`` hears of every copy that has been made, once its times are known: on a device that makes copies behind the
    host that is after the copy has been collected.

    ``table``, ``ledger`` and ``idle`` are for others to read only.
    """

    def __init__(
        self, table: SlotTable, pool: SlotPool, copies: CopyEngine, meter: Meter, link: IdleLink | None = None
    ) -> None:
        self.table = table
        self.ledger = Ledger(meter)
        self.idle: list[dict[int, int]] = [{} for _ in table.slots]  # by layer: see IdleExperts
        self._pool = pool
        self._copies = copies
        self._meter = meter
        self._link = link
        self._under_way: dict[ExpertId, Ticket] = {}  # not collected yet, oldest first
        self._untold: deque[_Made] = deque()  # of which the link has not heard, oldest first

    def load(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        """Starts a copy into an EMPTY slot; a prefetch is a guess.

        The copy is in the books before it is asked for: else one that an interrupt hides would be made into a slot that
        has been given to another by then.
        """
        ticket = self._copies.ticket(expert, slot, priority)
        self.table.begin_load(expert, slot)
        self._under_way[expert] = ticket
        if priority is Priority.PREFETCH:
            self.ledger.guess(expert)
        try:
            self._copies.ask(ticket)
        except BaseException:
            self.disown(expert)
            if expert in self._under_way and ticket.finished:
                self._note(ticket)
            raise
        return ticket

    def collect(self) -> list[Ticket]:
        """Takes note of the copies that have finished, well or not, and returns them in the order they did."""
        if not (self._under_way or self._untold):
            return []
        self._copies.settle()
        return self._noted()

    def settle(self) -> None:
        """Reports what was measured of the copies so far, and collects none."""
        self._copies.settle()
        self._tell_link()

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        """Stalls until one of ``tickets`` has finished, then does what ``collect`` does."""
        with self._meter.stall():
            self._copies.wait(tickets)
        return self._noted()

    def under_way(self) -> list[Ticket]:
        """The copies that have not been collected, oldest first."""
        return list(self._under_way.values())

    def use(self, expert: ExpertId) -> int | None:
        """Holds a READY expert for the layer that asks for it and returns its slot; None if it is not READY."""
        slot = self.table.slots[expert.layer].get(expert.expert)
        if slot is None or (self._under_way and expert in self._under_way):
            return None
        self.table.hold(slot)
        self.idle[expert.layer].pop(expert.expert, None)
        if self.ledger.unused:
            self.ledger.used(expert)
        return slot

    def release(self, layer: int, batch: Sequence[ReadyExpert]) -> None:
        """Takes back the holds of ``use`` on experts of ``layer``, once all work that reads them has been launched."""
        self._copies.fence([one.slot for one in batch])
        idle = self.idle[layer]
        for expert, slot in batch:
            self.table.unhold(slot)
            idle[expert] = slot

    def touch(self, expert: ExpertId, slot: int) -> None:
        """A READY expert that is not held counts as used last. Whether it was a guess is for ``came_true`` to say."""
        del self.idle[expert.layer][expert.expert]
        self.idle[expert.layer][expert.expert] = slot

    def came_true(self, chosen: Callable[[ExpertId], bool]) -> int:
        """Notes that the device has read those READY guesses that were ``chosen``; returns how many they are."""
        used = [expert for expert in self.ledger.unused if chosen(expert)]
        for expert in used:
            self.ledger.used(expert)
        return len(used)

    def filled_by_device(self, expert: ExpertId, slot: int | None) -> None:
        """The device has brought an expert by itself: into an EMPTY slot, or (None) into one it has lost since."""
        self.ledger.arrived(expert, self._pool.rows_SB.shape[1])
        if slot is not None:
            self.table.begin_load(expert, slot)
            self.table.finish_load(slot)
            self.idle[expert.layer][expert.expert] = slot

    def hasten(self, expert: ExpertId) -> Ticket:
        """The copy under way of an expert that a layer asks for now. If it was a guess, it becomes a demand."""
        ticket = self._under_way[expert]
        if self.ledger.asked_under_way(expert):
            self._copies.promote(ticket)
        return ticket

    def disown(self, expert: ExpertId) -> None:
        """No layer waits for this copy any more: it is cancelled, or becomes a guess if all of it is on its way.

        Does nothing where it has been collected.
        """
        if expert in self._under_way:
            self.ledger.guess(expert)
            self.cancel(expert)

    def cancel(self, expert: ExpertId) -> int | None:
        """Cancels a copy of which some is still queued and returns the slot that this frees, else None."""
        ticket = self._under_way[expert]
        if not self._copies.cancel(ticket):
            return None
        self._note(ticket)
        return ticket.slot

    def free(self, slot: int) -> int:
        """Gives up the expert in a READY slot that is not held, and returns the slot."""
        expert = self.table.expert_in(slot)
        self.table.evict(slot)
        assert expert is not None
        del self.idle[expert.layer][expert.expert]
        self.ledger.given_up(expert)
        self._scrub(slot)
        return slot

    def drain(self) -> None:
        """Cancels what is queued and waits for what runs: every slot is EMPTY or READY then, and may be written to."""
        for expert in list(self._under_way):
            self.disown(expert)
        while self._under_way:
            self.wait(self.under_way())
        self._copies.land()

    def restore(self) -> None:
        """Cleans up after a pass that was cut short, maybe between any two lines: drains, and makes the books agree.

        What the table says counts, except its holds (there are none between passes) and loads that have no copy.
        """
        self.drain()
        self._copies.fence(self.table.held())
        self.table.reset()
        self.ledger.restore(self.table.is_ready)
        for layer, ready in enumerate(self.table.slots):
            known = {expert: slot for expert, slot in self.idle[layer].items() if ready.get(expert) == slot}
            self.idle[layer] = known | ready  # those that were held come last, for they were used last
        for slot in self.table.empty_slots():
            self._scrub(slot)

    def empty_slot(self) -> int | None:
        """An EMPTY slot, None if there is none."""
        slot = self.table.first_empty()
        return None if slot < 0 else slot

    def is_complete(self, layer: int, num_experts: int) -> bool:
        """Whether all experts of a layer are READY, and no copy of any is under way."""
        return len(self.table.slots[layer]) == num_experts and not self._under_way

    def filled(self) -> list[int]:
        """How many slots each layer fills, copies under way included."""
        return list(map(len, self.table.slots))

    def _noted(self) -> list[Ticket]:
        finished = [ticket for ticket in self._under_way.values() if ticket.finished]
        finished.sort(key=attrgetter("finished_at"))
        for ticket in finished:
            self._note(ticket)
        self._tell_link()
        return finished

    def _tell_link(self) -> None:
        while self._link is not None and self._untold and self._untold[0].ticket.arrived_at is not None:
            self._link.arrived(*self._untold.popleft())

    def _note(self, ticket: Ticket) -> None:
        """Brings the books up to date with a finished copy."""
        expert, slot = ticket.expert, ticket.slot
        del self._under_way[expert]
        if ticket.state is TicketState.DONE:
            self.table.finish_load(slot)
            if self._link is not None:
                self._untold.append(_Made(ticket, asked=expert not in self.ledger.guesses))
            self.ledger.arrived(expert, ticket.nbytes)
            self.idle[expert.layer][expert.expert] = slot
        else:
            self.table.abort_load(slot)
            self.ledger.dropped(expert, ticket.sent if ticket.state is TicketState.CANCELLED else 0)
            self._scrub(slot)

    def _scrub(self, slot: int) -> None:
        if self._pool.scrub(slot):
            self._copies.fence([slot])
