"""Work that is recorded once and then replayed as a whole at the cost of one launch, as CUDA graphs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Recording(Protocol[Result_co]):
    """Recorded work. It reads and writes the memory that it was recorded with, whatever that holds at each replay."""

    @property
    def result(self) -> Result_co:
        """What the work returned. Every replay fills its tensors anew; before the first replay they are undefined."""
        ...

    def replay(self) -> None:
        """Enqueues the work behind all that was enqueued before."""
        ...


class Recorder(Protocol):
    """A device that records work. All that is enqueued runs in order while the host goes on; only ``wait`` blocks."""

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
        """Runs ``work`` once and records it: every launch, with the memory and the numbers of this run.

        ``work`` must not read what the device computes, and no shape may depend on that. Keep all recordings that share
        memory as long as one of them is replayed.
        """
        ...

    def wait(self) -> None:
        """Blocks the host until all that was enqueued is done."""
        ...
