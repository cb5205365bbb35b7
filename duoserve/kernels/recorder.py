"""Work that is recorded once and then replayed as a whole, so that it costs one launch: what a CUDA graph offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Recording(Protocol[Result_co]):
    """Recorded work. It reads and writes the memory that it was recorded with, whatever that holds by then."""

    @property
    def result(self) -> Result_co:
        """What the work returned; every replay fills its tensors anew, and before the first they are undefined."""
        ...

    def replay(self) -> None:
        """Enqueues the work behind all that was enqueued before."""
        ...


class Recorder(Protocol):
    """A device that records. What is enqueued runs in order, while the host goes on; ``wait`` alone blocks it."""

    @property
    def device(self) -> torch.device:
        """Where recorded work runs."""
        ...

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed host memory that the device copies from and to by itself."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueues a copy between memory of the device and memory of ``host``, or adds it to what is recorded."""
        ...

    def record(self, work: Callable[[], Result]) -> Recording[Result]:
        """Runs ``work`` once for real and records it: every launch, with the memory and the numbers it had now.

        It must not read what the device computes, and no shape may depend on that. Keep all recordings that share
        memory for as long as one of them is replayed.
        """
        ...

    def wait(self) -> None:
        """Blocks the host until all that was enqueued is done."""
        ...
