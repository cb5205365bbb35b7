"""What a model needs of the scheduler: experts, in slots, as they become ready."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self


class ReadyExpert(NamedTuple):
    """An expert of the leased layer and the slot that kernels may read it from."""

    expert: int
    slot: int


class Lease(Protocol):
    """The experts that one layer asked for, in batches: first those already READY, then the others as they arrive.

    A batch stays in its slots until the next one is asked for, or the ``with`` block ends. Asking for a batch waits
    where none has arrived; it raises CopyError when an expert that is needed cannot be brought.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[list[ReadyExpert]]: ...

    @abstractmethod
    def at_once(self) -> list[ReadyExpert]:
        """The next batch if it need not be waited for; else, or if there is none, nothing."""
        ...

    @abstractmethod
    def prefetch(self) -> None:
        """Starts copies of what the listeners predict, queued behind this layer's demands.

        Call it after they have heard the layer's routing, and once only; not at all where nothing listens.
        """
        ...


class ExpertSource(Protocol):
    """Where a model's MoE layers get their experts from."""

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> Lease:
        """Leases ``experts`` of ``layer``: distinct, the most wanted first. One lease is open at a time.

        ``counts`` says for how many tokens of the pass each is; one each where it is not given.
        """
        ...
