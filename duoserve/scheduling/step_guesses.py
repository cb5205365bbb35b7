"""Guesses for decode steps that the device carries out by itself: they are copied between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Priority
from duoserve.scheduling.foresight import Foresight
from duoserve.scheduling.link_budget import StepLink
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.residency import Residency


class StepGuesses:
    """After each step, asks ``foresight`` what the first layers of the next will want, and copies that.

    Between two steps no kernel reads or fills a slot, and nothing else is on the link. While a step runs, no guesses
    are copied: the link belongs to its misses, and guesses for it would come too late. ``now`` reads the copy engine's
    clock.
    """

    def __init__(self, residency: Residency, shape: ModelShape, foresight: Foresight, now: Callable[[], float]) -> None:
        self._residency = residency
        self._shape = shape
        self._foresight = foresight
        self._now = now
        self._link = StepLink(foresight.link)

    def stepped(self, num_hits: int, came_true: int) -> None:
        """A step has ended: over all layers it found ``num_hits`` experts in slots, ``came_true`` of them guesses."""
        self._link.stepped(self._now(), num_hits / len(self._shape.layers), came_true)

    def ask(self, room: Callable[[int], Sequence[int]]) -> None:
        """Starts the copies, once the last step's routing has been heard; ``room(n)`` gives up to n EMPTY slots."""
        copies: Sequence[ExpertId] = ()
        last = self._shape.layers[-1]
        if not self._foresight.guesses_within_budget or self._link.idle_before(last):
            ledger, slots = self._residency.ledger, self._residency.table.slots
            copies = self._foresight.guess(last, slots, ledger.guesses, ledger.unused, self._link).copies
        loads = list(zip(copies, room(len(copies)), strict=False)) if copies else []
        self._link.asked(self._now(), [len(self._residency.table.slots[expert.layer]) for expert, _ in loads])
        for expert, slot in loads:
            self._residency.load(expert, slot, Priority.PREFETCH)

    def pause(self) -> None:
        """Another pass comes before the next step: how long the link is idle until then is not measured."""
        self._link.pause()

    def launched(self) -> None:
        """The next step is launched: copies that have not begun are cancelled, and the step waits for the others."""
        self._link.launched(self._now())
        self._residency.drain()
