"""The host's own work in a replay: planning and predicting are really done, so what they take can be measured."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import TypeVar

from duoserve.experts.copy_engine import CopyEngine
from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Priority, Ticket
from duoserve.experts.virtual import VirtualClock

Result = TypeVar("Result")


class HostTime:
    """A block in which the time of the clock ``read`` (seconds) passes on the virtual clock too."""

    def __init__(self, clock: VirtualClock, read: Callable[[], float]) -> None:
        self._clock = clock
        self._read = read
        self._since: float | None = None

    def __enter__(self) -> None:
        self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Lets time pass from now on."""
        self._since = self._read()

    def stop(self) -> bool:
        """Puts the time that has passed on the virtual clock; no more passes then. Returns whether time was passing."""
        if self._since is None:
            return False
        self._clock.advance(max(0.0, self._read() - self._since))
        self._since = None
        return True


class UntimedEngine(CopyEngine):
    """Passes all calls on to ``inner``, whose own work takes no time of ``host``.

    ``inner`` stands for copy threads, whose work takes the times that were measured on a machine.
    """

    def __init__(self, inner: CopyEngine, host: HostTime) -> None:
        self._inner = inner
        self._host = host

    def now(self) -> float:
        return self._untimed(self._inner.now)

    def ticket(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        return self._untimed(lambda: self._inner.ticket(expert, slot, priority))

    def ask(self, ticket: Ticket) -> None:
        self._untimed(lambda: self._inner.ask(ticket))

    def promote(self, ticket: Ticket) -> None:
        self._untimed(lambda: self._inner.promote(ticket))

    def cancel(self, ticket: Ticket) -> bool:
        return self._untimed(lambda: self._inner.cancel(ticket))

    def fence(self, slots: Collection[int]) -> None:
        self._untimed(lambda: self._inner.fence(slots))

    def land(self) -> None:
        self._untimed(self._inner.land)

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        return self._untimed(lambda: self._inner.wait(tickets))

    def settle(self) -> None:
        self._untimed(self._inner.settle)

    def close(self) -> None:
        self._untimed(self._inner.close)

    def _untimed(self, call: Callable[[], Result]) -> Result:
        passing = self._host.stop()
        try:
            return call()
        finally:
            if passing:
                self._host.start()
