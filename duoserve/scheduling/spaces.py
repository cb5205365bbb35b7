"""Spaces: the slots that a pass may copy to, and what becomes of a slot once its expert has been computed.

There is one class for each way to use slots. A slot belongs to one space at a time: to the ring of the prefill that is
under way, or to the space of the decode steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Set

from duoserve.experts.layout import ExpertId
from duoserve.scheduling.eviction import Eviction, least_valued
from duoserve.scheduling.plan import BEFORE_FIRST, NO_RING, LayerPlan, ModelShape, RingView
from duoserve.scheduling.ranking import Ranking
from duoserve.scheduling.residency import Residency


class Space(ABC):
    """What all spaces share. They hand out EMPTY slots only, and never touch one that is held or LOADING.

    A pass may read experts in any slot, but gives up only slots of its own space, and cancels only copies into these.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._plan = LayerPlan(BEFORE_FIRST, ())

    def enter(self, plan: LayerPlan) -> None:
        """The pass has come to the layer of ``plan``: queued guesses are cancelled, except for layers ahead of it."""
        self._plan = plan
        for guess in list(self._residency.ledger.guesses):
            if guess.layer not in plan.ahead and self._owns_slot_of(guess):
                self._residency.cancel(guess)

    def ring_view(self, layer: int) -> RingView:
        """The prefill ring as planning sees it at ``layer``; NO_RING where there is none."""
        return NO_RING

    @abstractmethod
    def spare(self, layer: int) -> int | None:
        """A slot for a guess about ``layer``, None if there is none to spare."""

    def take(self) -> int | None:
        """A slot for a demand; None if there is none now. Guesses make way for it, the newest first."""
        slot = self.spare(self._plan.layer)
        if slot is None:
            slot = self._cancel_guess()
        return self._free_guess() if slot is None else slot

    @abstractmethod
    def retire(self, expert: int, slot: int) -> None:
        """The plan's layer is done with this expert (computed or not), and its slot is not held any more."""

    @abstractmethod
    def _owns(self, slot: int) -> bool:
        """Whether the slot belongs to this space."""

    def _owns_slot_of(self, expert: ExpertId) -> bool:
        return self._owns(self._residency.table.slot_of(expert))

    def _cancel_guess(self) -> int | None:
        for guess in filter(self._owns_slot_of, reversed(list(self._residency.ledger.guesses))):
            slot = self._residency.cancel(guess)
            if slot is not None:
                return slot
        return None

    def _free_guess(self) -> int | None:
        """Gives up the newest guess that has arrived, for its slot."""
        slots = map(self._residency.table.slot_of, reversed(self._residency.ledger.unused))
        return self._free_first([slot for slot in slots if self._owns(slot)])

    def _free_stale(self) -> int | None:
        """Gives up a guess that has arrived and turned out wrong, for its slot."""
        wrong = [guess for guess in self._residency.ledger.unused if guess.layer not in self._plan.ahead]
        slots = map(self._residency.table.slot_of, wrong)
        return self._free_first([slot for slot in slots if self._owns(slot)])

    def _free_first(self, slots: list[int]) -> int | None:
        return self._residency.free(slots[0]) if slots else None


class Shared(Space):
    """A space of all slots, except those ``lent`` to the ring of a prefill that was set aside."""

    def __init__(self, residency: Residency, lent: Set[int] = frozenset()) -> None:
        super().__init__(residency)
        self.lent = lent

    def _owns(self, slot: int) -> bool:
        return slot not in self.lent

    def _empty_slot(self) -> int | None:
        if not self.lent:
            return self._residency.empty_slot()
        return next((slot for slot in self._residency.table.empty_slots() if slot not in self.lent), None)


class Cache(Shared):
    """The space of policies that keep experts: one stays in its slot until the eviction picks it."""

    def __init__(self, residency: Residency, shape: ModelShape, eviction: Eviction, ranking: Ranking) -> None:
        super().__init__(residency)
        self._eviction = eviction
        self._ranking = ranking
        self._quotas = eviction.quotas(residency.table.num_slots, shape)

    def spare(self, layer: int) -> int | None:
        """An EMPTY slot, else that of a victim, which is no expert that the plan spares."""
        slot = self._empty_slot()
        return self.give_up(layer, self._plan.spared) if slot is None else slot

    def take(self) -> int | None:
        """As in Space; if nothing else is left, experts that the plan spares are given up too."""
        slot = super().take()
        return self.give_up(self._plan.layer) if slot is None and self._plan.spared else slot

    def retire(self, expert: int, slot: int) -> None:
        """Nothing: the expert stays in its slot."""

    def give_up(self, loading: int, spared: Collection[ExpertId] = ()) -> int | None:
        """Gives up the least valued expert and gives its slot; ``loading`` is the layer it is for, or BEFORE_FIRST.

        None if every slot is held or LOADING, or has an expert that is ``spared``.
        """
        idle, values = self._residency.idle, self._ranking.values
        if self.lent:
            spared = {*spared, *self._lodgers()}
        for layers in self._eviction.groups(loading, self._residency.table.slots, self._quotas):
            slot = least_valued(layers, idle, values, spared)
            if slot is not None:
                return self._residency.free(slot)
        return None

    def _lodgers(self) -> Iterator[ExpertId]:
        """The experts in slots that are lent."""
        experts = map(self._residency.table.expert_in, self.lent)
        return (expert for expert in experts if expert is not None)


class Uncached(Shared):
    """The space of policies that keep nothing: a slot is freed as soon as its expert has been computed."""

    def __init__(self, residency: Residency, lent: Set[int] = frozenset()) -> None:
        super().__init__(residency, lent)
        for slot, expert in residency.table.ready():
            if expert not in residency.ledger.unused and self._owns(slot):
                residency.free(slot)

    def enter(self, plan: LayerPlan) -> None:
        """As in Space; guesses that have arrived and turned out wrong are freed too."""
        super().enter(plan)
        while self._free_stale() is not None:
            pass

    def spare(self, layer: int) -> int | None:
        """An EMPTY slot, else that of a guess that has turned out wrong."""
        slot = self._empty_slot()
        return self._free_stale() if slot is None else slot

    def retire(self, expert: int, slot: int) -> None:
        """Frees the slot, unless it is lent."""
        if self._owns(slot):
            self._residency.free(slot)


class Ring(Space):
    """The space of a prefill: its experts stream through ``slots``, all EMPTY when it begins. Others are left alone.

    ``size`` of the slots are used again and again. The surplus is filled on the way, with about as many experts of each
    layer, and left behind so. A slot is *spent* when its expert has been computed; it is freed only when it is needed,
    so that the last experts stay resident as well.
    """

    def __init__(self, residency: Residency, shape: ModelShape, size: int, slots: Collection[int]) -> None:
        super().__init__(residency)
        self._shape = shape
        self._size = size
        self._slots = set(slots)
        self._spent: dict[int, None] = {}  # oldest first

    def ring_view(self, layer: int) -> RingView:
        """As in Space. The layers that are left, this one included, share the surplus evenly."""
        ledger = self._residency.ledger
        ahead = [guess for guess in (*ledger.guesses, *ledger.unused) if guess.layer > layer]
        pending = sum(self._owns_slot_of(guess) for guess in ahead)
        here = self._residency.table.slots[layer] if layer != BEFORE_FIRST else {}
        settled = frozenset(expert for expert, slot in here.items() if slot not in self._slots)
        surplus, layers_left = len(self._slots) - self._size, len(self._shape.after(layer - 1))
        return RingView(max(0, self._size - pending), settled, surplus // max(1, layers_left))

    def spare(self, layer: int) -> int | None:
        """An EMPTY slot, else the slot that has been spent for longest, else that of a wrong guess."""
        slot = next((slot for slot in self._residency.table.empty_slots() if slot in self._slots), None)
        if slot is None:
            spent = next((slot for slot in self._spent if not self._residency.table.holds(slot)), None)
            if spent is None:
                return self._free_stale()
            del self._spent[spent]
            slot = self._residency.free(spent)
        return slot

    def retire(self, expert: int, slot: int) -> None:
        """The slot is spent, unless it is none of the ring's or the plan keeps its expert."""
        if expert in self._plan.keep:
            self._slots.discard(slot)
            self._spent.pop(slot, None)
        elif slot in self._slots:
            self._spent[slot] = None

    def set_aside(self) -> Set[int]:
        """Other passes come before the next layer: gives the slots that the ring keeps meanwhile.

        These are ``size`` slots, first those with guesses, arrived or on their way. The surplus goes to the other
        passes.
        """
        speculative = {*self._residency.ledger.guesses, *self._residency.ledger.unused}
        wanted_later = {self._residency.table.slot_of(guess) for guess in speculative}
        self._slots = set(sorted(self._slots, key=lambda slot: slot not in wanted_later)[: self._size])
        self._spent = {slot: None for slot in self._spent if slot in self._slots}
        return frozenset(self._slots)

    def take_up(self) -> None:
        """The prefill goes on. A slot whose guess another pass has used is spent, as if the prefill had used it."""
        table, unused = self._residency.table, self._residency.ledger.unused
        for slot, expert in table.ready():
            if slot in self._slots and expert not in unused:
                self._spent.setdefault(slot)

    def _owns(self, slot: int) -> bool:
        return slot in self._slots
