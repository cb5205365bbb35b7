"""Times of work on a GPU: captured once as a CUDA graph, replayed in turn with what it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache

import torch

from duoserve.kernels.cuda_graphs import released_on_error
from harness import interleave

Work = Callable[[], object]

# The clock starts behind a kernel that idles for some 0.1 ms, so that the launch of what is timed is over by then.
PAUSE_CYCLES = 200_000
LONG_PAUSE_CYCLES = 20_000_000  # 10 ms, at least, for work that is launched piece by piece
FASTEST_HZ = 3e9  # of a GPU's cycles: no pause is shorter than its cycles at this rate
MARGIN = 2.0  # of the pause over what the launch took once: the host is not always as fast
SECONDS = 0.12  # of replays a figure
MIN_ROUNDS, MAX_ROUNDS = 7, 40


@cache
def _warm_up_stream() -> torch.cuda.Stream:
    """One for all: the allocator keeps memory apart by stream."""
    return torch.cuda.Stream()


class Replay:
    """``steps``, one after another, as one CUDA graph."""

    pause_cycles = PAUSE_CYCLES

    def __init__(self, steps: Sequence[Work]) -> None:
        self.num_steps = len(steps)
        self._steps = steps  # a graph knows addresses only: what lies there must live as long
        stream = _warm_up_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, opens handles and fills workspaces: none of it may be captured
            for step in steps:
                step()
        self._graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        with released_on_error(pool), torch.cuda.graph(self._graph, pool=pool):
            for step in steps:
                step()

    def run(self) -> None:
        """Starts all steps."""
        self._graph.replay()


class Queued:
    """``steps`` launched one by one behind a pause that outlasts their launch: for what no graph can hold."""

    def __init__(self, steps: Sequence[Work]) -> None:
        self.num_steps = len(steps)
        self._steps = steps
        self.run()  # compiles
        began = time.perf_counter()
        self.run()
        launch_s = time.perf_counter() - began
        self.pause_cycles = max(LONG_PAUSE_CYCLES, int(MARGIN * launch_s * FASTEST_HZ))

    def run(self) -> None:
        """Starts all steps."""
        for step in self._steps:
            step()


Timed = Replay | Queued


def captured(steps: Sequence[Work]) -> Timed:
    """A graph where the steps allow it, else the steps as they are; the result's type says which."""
    with suppress(RuntimeError), torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves its own
        return Replay(steps)
    torch.cuda.synchronize()
    return Queued(steps)


def microseconds(timed: Timed) -> float:
    """Of one step, by device events around all of them."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(timed.pause_cycles)
    start.record()
    timed.run()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop) / timed.num_steps


def rounds_for(slowest_us: float) -> int:
    """How often something is timed whose replay takes ``slowest_us``."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(1e6 * SECONDS / max(slowest_us, 1.0))))


def times_us(contestants: Mapping[str, Timed], rounds: int | None = None) -> dict[str, list[float]]:
    """Microseconds a step of every contestant, in turns (A B A B), after a warm-up; equal indices are pairs."""
    slowest = 0.0
    for timed in contestants.values():
        microseconds(timed)
        slowest = max(slowest, microseconds(timed) * timed.num_steps)
    done = interleave(
        list(contestants), rounds or rounds_for(slowest), lambda name: {"us": microseconds(contestants[name])}
    )
    return {name: [r["us"] for r in played] for name, played in done.items()}
