"""The lanes of a CUDA device as streams and events."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from duoserve.experts.streams import Lane, Mark, Streams

# Lower is more urgent. The kernels of a copy lane are few and short; what counts is that copies start at once.
_URGENT, _ORDINARY = -1, 0


class CudaStreams(Streams):
    """A stream for each lane of copies; COMPUTE is whatever stream is current in the thread that asks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = {
            Lane.DEMAND: torch.cuda.Stream(device, priority=_URGENT),
            Lane.PREFETCH: torch.cuda.Stream(device, priority=_ORDINARY),
        }

    def mark(self, lane: Lane) -> Mark:
        """As in Streams: an event with a time."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream(lane))
        return event

    def after(self, lane: Lane, mark: Mark) -> None:
        self._stream(lane).wait_event(_event(mark))

    def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
        """As in Streams; asynchronous for pinned sources, for others the host waits until they are read."""
        with torch.cuda.stream(self._stream(lane)):
            target_B.copy_(source_B, non_blocking=True)

    def passed(self, mark: Mark) -> bool:
        return bool(_event(mark).query())

    def wait(self, mark: Mark) -> None:
        """As in Streams; releases the GIL."""
        _event(mark).synchronize()

    def seconds(self, earlier: Mark, later: Mark) -> float:
        """As in Streams, to about a microsecond."""
        return float(_event(earlier).elapsed_time(_event(later))) * 1e-3

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if lane is Lane.COMPUTE else self._copies[lane]


def _event(mark: Mark) -> torch.cuda.Event:
    return cast("torch.cuda.Event", mark)
