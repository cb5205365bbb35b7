"""Leases: what a layer holds while its experts are brought into slots, handed out and computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from duoserve.errors import ClosedError, IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Priority, Ticket
from duoserve.scheduling.plan import LayerPlan
from duoserve.scheduling.residency import Residency
from duoserve.scheduling.source import Lease, ReadyExpert
from duoserve.scheduling.spaces import Space


class OpenLease(Lease, ABC):
    """A lease of ``layer`` as the scheduler has it: its own iterator, and open until it is closed.

    ``complete``: every wanted expert has been handed out and retired.
    """

    layer: int
    complete: bool

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether nothing is held and nothing is waited for: at the end, or when closed."""

    @abstractmethod
    def close(self) -> None:
        """Gives back all slots that are held; copies that are still under way become guesses. Idempotent."""

    @abstractmethod
    def __next__(self) -> list[ReadyExpert]: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self


class StandingLease(OpenLease):
    """A lease where all experts are in slots for good: nothing has to be held, planned or waited for."""

    def __init__(self, layer: int, ready: list[ReadyExpert]) -> None:
        self.layer = layer
        self.complete = False
        self._ready = ready

    @property
    def idle(self) -> bool:
        return not self._ready

    def close(self) -> None:
        self._ready = []

    def __next__(self) -> list[ReadyExpert]:
        if not self._ready:
            self.complete = True
            raise StopIteration
        return self.at_once()

    def at_once(self) -> list[ReadyExpert]:
        ready, self._ready = self._ready, []
        return ready

    def prefetch(self) -> None:
        """Does nothing, as no expert has to be copied."""


class SlotLease(OpenLease):
    """Carries out the plan of one layer.

    A wanted expert is first *missing* (it has no slot), then *loading* (its copy is under way), *arrived* and
    *computing* (held in its slot), and at last retired. ``plan_prefetch`` adds guesses to the plan once the layer's
    routing has been heard; None: there are none.
    """

    def __init__(
        self,
        residency: Residency,
        space: Space,
        plan: LayerPlan,
        plan_prefetch: Callable[[LayerPlan], LayerPlan] | None = None,
    ) -> None:
        self._residency = residency
        self._plan_prefetch = plan_prefetch
        self._space = space
        self._plan = plan
        self.layer = plan.layer
        self._missing = deque(plan.demand)
        self._prefetch = deque(plan.prefetch)
        self._loading: dict[ExpertId, Ticket] = {}
        self._arrived: list[ReadyExpert] = []
        self._computing: list[ReadyExpert] = []
        self.complete = False

    def start(self, wanted: Sequence[int]) -> int:
        """Holds the experts that are READY, speeds up those on their way, and asks for the others; gives how many were
        READY.
        """
        self._claim(wanted)
        num_ready = len(self._arrived)
        self._space.enter(self._plan)
        self._fill()
        return num_ready

    @property
    def idle(self) -> bool:
        return not (self._missing or self._loading or self._arrived or self._computing)

    def close(self) -> None:
        if self.complete:
            return
        held, loading = [*self._computing, *self._arrived], self._loading
        self._loading, self._arrived, self._computing = {}, [], []
        self._missing.clear()
        self._prefetch.clear()
        self._retire(held)
        for expert in loading:
            self._residency.disown(expert)

    def at_once(self) -> list[ReadyExpert]:
        return next(self) if self._arrived and not self._must_wait() else []

    def prefetch(self) -> None:
        if self._plan_prefetch is not None:
            self._plan = self._plan_prefetch(self._plan)
            known = set(self._prefetch)  # of a whole layer that waits for slots: guesses may be about it
            self._prefetch.extend(one for one in self._plan.prefetch if one not in known)
            self._space.enter(self._plan)
            self._fill()

    def __next__(self) -> list[ReadyExpert]:
        done, self._computing = self._computing, []
        self._retire(done)
        self._fill()
        if self._loading and not self._arrived:
            self._take(self._residency.collect())
        while self._must_wait():
            self._take(self._residency.wait(self._awaited()))
            self._fill()
        if not self._arrived:
            self.complete = True
            raise StopIteration
        self._computing, self._arrived = self._arrived, []
        return self._computing

    def _claim(self, wanted: Sequence[int]) -> None:
        demanded = set(self._plan.demand)
        for number in wanted:
            if number not in demanded:
                expert = ExpertId(self._plan.layer, number)
                slot = self._residency.use(expert)
                if slot is None:
                    self._loading[expert] = self._residency.hasten(expert)
                else:
                    self._arrived.append(ReadyExpert(number, slot))

    def _fill(self) -> None:
        """Starts copies while there are slots for them: first of this layer's missing experts, then of guesses."""
        while self._missing and (slot := self._space.take()) is not None:
            expert = ExpertId(self._plan.layer, self._missing.popleft())
            self._loading[expert] = self._residency.load(expert, slot, Priority.DEMAND)
        while self._prefetch and not self._missing:
            slot = self._space.spare(self._prefetch[0].layer)
            if slot is None:
                break
            self._residency.load(self._prefetch.popleft(), slot, Priority.PREFETCH)

    def _take(self, finished: Sequence[Ticket]) -> None:
        """Holds the experts whose copies have ended; raises the error of a copy of this layer that has failed."""
        failed: list[Ticket] = []
        for ticket in finished:
            if self._loading.pop(ticket.expert, None) is None:
                continue
            slot = self._residency.use(ticket.expert)
            if slot is None:
                failed.append(ticket)
            else:
                self._arrived.append(ReadyExpert(ticket.expert.expert, slot))
        if failed:
            raise failed[0].error or ClosedError("the copy engine was closed while a layer waited for its experts")

    def _must_wait(self) -> bool:
        if self._arrived:
            return bool(self._loading) and not self._plan.overlap
        return bool(self._loading or self._missing)

    def _awaited(self) -> list[Ticket]:
        """The copies to wait for: this layer's, or any that run if guesses have all the slots it needs."""
        awaited = list(self._loading.values()) or self._residency.under_way()
        if not awaited:
            raise IntegrityError(f"layer {self._plan.layer} needs a slot, but none is free, idle or on its way")
        return awaited

    def _retire(self, batch: Sequence[ReadyExpert]) -> None:
        if batch:
            # The most wanted last, so that it counts as used last.
            self._residency.release(self._plan.layer, batch[::-1])
        for expert, slot in reversed(batch):
            self._space.retire(expert, slot)
