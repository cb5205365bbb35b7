"""The queues of a device: one computes, the others copy, and marks order them among each other.

A device works through each lane in order, and through different lanes in any order that no mark forbids. The host only
enqueues, and blocks nowhere but in ``wait``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import Protocol

from torch import Tensor


class Lane(Enum):
    """What a queue is for. A demand never stands behind a prefetch, for it has a lane of its own."""

    COMPUTE = "compute"
    DEMAND = "demand"
    PREFETCH = "prefetch"


class Mark(Protocol):
    """A point in a lane: passed once all that was enqueued there before it is done."""


class Streams(ABC):
    """The lanes of one device. Any thread may use them; COMPUTE is the lane on which the caller's kernels run."""

    @abstractmethod
    def mark(self, lane: Lane) -> Mark:
        """The point that ``lane`` has been filled to."""

    @abstractmethod
    def after(self, lane: Lane, mark: Mark) -> None:
        """What is enqueued on ``lane`` from now on starts when ``mark`` has passed. The host goes on."""

    @abstractmethod
    def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
        """Enqueues a copy of bytes from the host to the device; the source must stay as it is until it is made."""

    @abstractmethod
    def passed(self, mark: Mark) -> bool:
        """Whether the device has come to ``mark``."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """Blocks the host until the device has come to ``mark``."""

    @abstractmethod
    def seconds(self, earlier: Mark, later: Mark) -> float:
        """The device's time between two marks that have passed."""
