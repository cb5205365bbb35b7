"""Where a pass may copy to, and what becomes of a slot once its expert has been computed: one class for each regime."""

from __future__ import annotations

from collections.abc import Collection

from duoserve.experts.layout import ExpertId
from duoserve.scheduling.eviction import Eviction, least_valued
from duoserve.scheduling.plan import BEFORE_FIRST, NO_RING, LayerPlan, ModelShape, RingView
from duoserve.scheduling.ranking import Ranking
from duoserve.scheduling.residency import Residency


class Space:
    """What the regimes share. A slot that it hands out is EMPTY; one that is held or LOADING is never touched."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._plan = LayerPlan(BEFORE_FIRST, ())

    def enter(self, plan: LayerPlan) -> None:
        """The pass has come to the layer of ``plan``: queued guesses for layers that are not ahead are cancelled."""
        self._plan = plan
        for guess in list(self._residency.ledger.guesses):
            if guess.layer not in plan.ahead:
                self._residency.cancel(guess)

    def ring_view(self, layer: int) -> RingView:
        """The prefill ring as planning sees it at ``layer``; NO_RING where there is none."""
        return NO_RING

    def spare(self, layer: int) -> int | None:
        """A slot for a guess about ``layer``, None if there is none to spare."""
        raise NotImplementedError

    def take(self) -> int | None:
        """A slot for a demand, for which guesses make way, the newest first; None if none can be had now."""
        slot = self.spare(self._plan.layer)
        if slot is None:
            slot = self._cancel_guess()
        return self._free_guess() if slot is None else slot

    def retire(self, expert: int, slot: int) -> None:
        """An expert of the plan's layer has been computed, or will not be; nobody holds its slot any more."""

    def _may_write(self, slot: int) -> bool:
        return True

    def _cancel_guess(self) -> int | None:
        for guess in reversed(list(self._residency.ledger.guesses)):
            slot = self._residency.cancel(guess)
            if slot is not None:
                return slot
        return None

    def _free_guess(self) -> int | None:
        """The slot of the newest guess that has arrived."""
        slots = map(self._residency.table.slot_of, reversed(self._residency.ledger.unused))
        return self._free_first([slot for slot in slots if self._may_write(slot)])

    def _free_stale(self) -> int | None:
        """The slot of a guess that has arrived and turned out wrong."""
        wrong = [guess for guess in self._residency.ledger.unused if guess.layer not in self._plan.ahead]
        slots = map(self._residency.table.slot_of, wrong)
        return self._free_first([slot for slot in slots if self._may_write(slot)])

    def _free_first(self, slots: list[int]) -> int | None:
        return self._residency.free(slots[0]) if slots else None


class Cache(Space):
    """Experts stay where they are until the eviction picks them."""

    def __init__(self, residency: Residency, shape: ModelShape, eviction: Eviction, ranking: Ranking) -> None:
        super().__init__(residency)
        self._eviction = eviction
        self._ranking = ranking
        self._quotas = eviction.quotas(residency.table.num_slots, shape, len(residency.slots))

    def spare(self, layer: int) -> int | None:
        """An EMPTY slot, else that of a victim that the plan does not spare."""
        slot = self._residency.empty_slot()
        return self.give_up(layer, self._plan.spared) if slot is None else slot

    def take(self) -> int | None:
        """As in Space; in the end not even those that the plan spares are."""
        slot = super().take()
        return self.give_up(self._plan.layer) if slot is None and self._plan.spared else slot

    def give_up(self, loading: int, spared: Collection[ExpertId] = ()) -> int | None:
        """Frees the slot of the least valued expert for the layer that is ``loading`` (BEFORE_FIRST: for none).

        None if every slot is held or LOADING, or its expert is ``spared``.
        """
        idle, values = self._residency.idle, self._ranking.values
        for layers in self._eviction.groups(loading, self._residency.slots, self._quotas):
            slot = least_valued(layers, idle, values, spared)
            if slot is not None:
                return self._residency.free(slot)
        return None


class Scratch(Space):
    """Nothing is kept: a slot is freed as soon as its expert has been computed."""

    def __init__(self, residency: Residency) -> None:
        super().__init__(residency)
        for slot, expert in residency.table.ready():
            if expert not in residency.ledger.unused:
                residency.free(slot)

    def enter(self, plan: LayerPlan) -> None:
        """As in Space; guesses that have arrived and turned out wrong are freed too."""
        super().enter(plan)
        while self._free_stale() is not None:
            pass

    def spare(self, layer: int) -> int | None:
        """An EMPTY slot, else that of a guess that was wrong when it came."""
        slot = self._residency.empty_slot()
        return self._free_stale() if slot is None else slot

    def retire(self, expert: int, slot: int) -> None:
        """Frees the slot."""
        self._residency.free(slot)


class Ring(Space):
    """A prefill's: its experts stream through ``slots``, EMPTY when it began; all others stay as they are.

    ``size`` of them go round to the end; the surplus is left behind filled, with as many experts of each layer.
    Spent slots are freed only when they are needed, so that what came last stays resident too.
    """

    def __init__(self, residency: Residency, shape: ModelShape, size: int, slots: Collection[int]) -> None:
        super().__init__(residency)
        self._shape = shape
        self._size = size
        self._slots = set(slots)
        self._spent: dict[int, None] = {}  # oldest first

    def ring_view(self, layer: int) -> RingView:
        """As in Space. The surplus is shared evenly by the layers that are left, this one included."""
        ledger, slot_of = self._residency.ledger, self._residency.table.slot_of
        ahead = [guess for guess in (*ledger.guesses, *ledger.unused) if guess.layer > layer]
        pending = sum(self._may_write(slot_of(guess)) for guess in ahead)
        here = self._residency.slots[layer] if layer != BEFORE_FIRST else {}
        settled = frozenset(expert for expert, slot in here.items() if slot not in self._slots)
        surplus, layers_left = len(self._slots) - self._size, len(self._shape.after(layer - 1))
        return RingView(max(0, self._size - pending), settled, surplus // max(1, layers_left))

    def spare(self, layer: int) -> int | None:
        """An EMPTY slot, else that of the expert that was computed first, else that of a wrong guess."""
        slot = self._residency.empty_slot() if self._residency.table.first_empty() in self._slots else None
        if slot is None:
            spent = next((slot for slot in self._spent if not self._residency.table.holds(slot)), None)
            if spent is None:
                return self._free_stale()
            del self._spent[spent]
            slot = self._residency.free(spent)
        return slot

    def retire(self, expert: int, slot: int) -> None:
        """The slot is spent, unless the expert was there before or the plan keeps it."""
        if expert in self._plan.keep:
            self._slots.discard(slot)
            self._spent.pop(slot, None)
        elif slot in self._slots:
            self._spent[slot] = None

    def _may_write(self, slot: int) -> bool:
        return slot in self._slots
