"""What the host adds to recorded decode steps: a step on the host's clock, less what the device did for it meanwhile.

The device is busy in a replay, and waits for copies between replays, by its own events. What it waits for within the
events of a replay is the launch: that is the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from duoserve.experts.streams import Lane, Mark, Streams
from duoserve.kernels.recorder import Recorder, Recording, Result
from duoserve.kv_cache import NewTokens
from duoserve.launching.event import event_steps
from duoserve.launching.graph import graph_steps
from duoserve.launching.launch import Launch, StepParts
from duoserve.launching.recorded import RecordedRunner
from duoserve.metrics import Meter
from duoserve.passes import StepRunner

Clock = Callable[[], float]


@dataclass
class StepTimes:
    """Seconds of ``steps`` steps together.

    ``recorded_s`` is the host's time from a step's tokens to its logits, ``busy_s`` the device's in replays.
    ``noting_s`` is what taking the times added to the former, ``aside_s`` what it took outside of that.
    """

    steps: int = 0
    recorded_s: float = 0.0
    busy_s: float = 0.0
    noting_s: float = 0.0
    aside_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


class StallMeter(Meter):
    """Also sums for how long the device itself waited for copies; ``stall_s`` has the host's part in that as well."""

    device_stall_s = 0.0

    def stalled(self, started: float, finished: float) -> None:
        """As in Meter."""
        super().stalled(started, finished)
        self.device_stall_s += finished - started


class _Span(NamedTuple):
    """A replay between two marks of the device.

    Seconds of the host: ``noted_s`` for the first mark, ``launched_s`` for the replay; both zero where the device had
    other work all the while.
    """

    begin: Mark
    end: Mark
    noted_s: float
    launched_s: float


class TimedRecorder(Recorder):
    """``inner``, whose replays are put between marks of ``streams`` while ``is_timing``."""

    def __init__(self, inner: Recorder, streams: Streams, clock: Clock = time.perf_counter) -> None:
        self.is_timing = False
        self._inner = inner
        self._streams = streams
        self._clock = clock
        self._spans: list[_Span] = []

    @property
    def device(self) -> torch.device:
        """As in Recorder."""
        return self._inner.device

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As in Recorder."""
        return self._inner.host(shape, dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """As in Recorder."""
        self._inner.copy(target, source)

    def record(self, work: Callable[[], Result]) -> Recording[Result]:
        """As in Recorder."""
        return _TimedRecording(self, self._inner.record(work))

    def wait(self) -> None:
        """As in Recorder."""
        self._inner.wait()

    def replay(self, recording: Recording[Any]) -> None:
        """Replays ``recording``, which ``inner`` has made."""
        if not self.is_timing:
            recording.replay()
            return
        began = self._clock()
        begin = self._streams.mark(Lane.COMPUTE)
        launching = self._clock()
        recording.replay()
        launched = self._clock()
        late = self._streams.passed(begin)  # the device had nothing else to do, and waited for the launch
        noted_s, launched_s = (launching - began, launched - launching) if late else (0.0, 0.0)
        self._spans.append(_Span(begin, self._streams.mark(Lane.COMPUTE), noted_s, launched_s))

    def take(self) -> tuple[float, float] | None:
        """Busy and noting seconds of all replays since the last call, which are done; None if there was none."""
        spans, self._spans = self._spans, []
        if not spans:
            return None
        busy = [max(0.0, self._streams.seconds(span.begin, span.end) - span.launched_s) for span in spans]
        return sum(busy), sum(span.noted_s for span in spans)


class _TimedRecording(Recording[Result], Generic[Result]):
    def __init__(self, recorder: TimedRecorder, inner: Recording[Result]) -> None:
        self._recorder = recorder
        self._inner = inner

    @property
    def result(self) -> Result:
        return self._inner.result

    def replay(self) -> None:
        self._recorder.replay(self._inner)


class TimedRunner(StepRunner):
    """``inner``, whose recorded steps are timed inside ``timing()``; ``recorder`` has recorded them."""

    def __init__(self, inner: RecordedRunner, recorder: TimedRecorder, clock: Clock = time.perf_counter) -> None:
        self.times = StepTimes()
        self._inner = inner
        self._recorder = recorder
        self._clock = clock

    @property
    def num_recordings(self) -> int:
        """Steps that were recorded so far."""
        return self._inner.num_recordings

    @contextmanager
    def timing(self) -> Iterator[StepTimes]:
        """Steps inside are timed, in times of their own."""
        self.times = StepTimes()
        self._recorder.is_timing = True
        try:
            yield self.times
        finally:
            self._recorder.is_timing = False

    def __call__(self, new_tokens: NewTokens) -> Tensor:
        """As in StepRunner."""
        began = self._clock()
        logits_BV = self._inner(new_tokens)
        if self._recorder.is_timing:
            self._note(began, self._clock())
        return logits_BV

    def prepare(self, num_sequences: int) -> None:
        """As in StepRunner."""
        self._inner.prepare(num_sequences)

    def _note(self, began: float, ended: float) -> None:
        taken = self._recorder.take()
        if taken is not None:
            times, (busy_s, noting_s) = self.times, taken
            times.steps += 1
            times.recorded_s += ended - began
            times.busy_s += busy_s
            times.noting_s += noting_s
            times.aside_s += self._clock() - ended


def timed_runner(launch: Launch, parts: StepParts, recorder: TimedRecorder) -> TimedRunner:
    """Steps that are launched by EVENT or GRAPH, as ``make_step_runner`` makes them."""
    model, cache = parts.model, parts.cache
    if launch is Launch.EVENT:
        steps = event_steps(model, cache, recorder)
    else:
        steps = graph_steps(model, cache, recorder, parts.store, parts.scheduler.read_through())
    return TimedRunner(RecordedRunner(model, cache, steps), recorder)


def host_seconds(times: dict[str, Any]) -> tuple[float, float]:
    """The host's own seconds of a step: all from token to token, and what of it lies in the recorded step.

    ``times`` are StepTimes, with ``wall_s`` from token to token and ``stall_s`` of the device. The host's time beside a
    busy device costs nothing and is not in it.
    """
    of_device = times["busy_s"] + times["stall_s"] + times["noting_s"]
    whole, recorded = times["wall_s"] - times["aside_s"] - of_device, times["recorded_s"] - of_device
    return whole / times["steps"], recorded / times["steps"]
