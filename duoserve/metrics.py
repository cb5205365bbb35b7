"""Where the time and the bytes of a request went: ``Meter`` collects, ``Stats`` is what it saw.

Two lanes are timed. The compute lane is busy inside ``Meter.compute()``, except inside ``Meter.stall()``, where it
waits for a copy. The copy lane is busy while at least one copy runs. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, dataclass, field, replace
from operator import add, sub
from typing import Any

from duoserve.config import Phase
from duoserve.timeline import Timeline


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that at least ``percent`` % of them do not exceed; NaN if there are no values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


@dataclass
class ByteCounts:
    """Copied bytes by what they were good for; an expert's bytes are counted once that is known.

    ``demanded``: asked for after the routing. ``prefetched_useful``: in its slot before it was asked for.
    ``prefetched_late``: guessed right, still under way when asked for. ``wasted``: given up without having been used;
    of a copy that was cancelled half-way, the bytes that had been moved by then.
    """

    demanded: int = 0
    prefetched_useful: int = 0
    prefetched_late: int = 0
    wasted: int = 0

    @property
    def total(self) -> int:
        """All bytes of which the use is known."""
        return self.demanded + self.prefetched_useful + self.prefetched_late + self.wasted

    def __add__(self, other: ByteCounts) -> ByteCounts:
        return ByteCounts(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: ByteCounts) -> ByteCounts:
        return ByteCounts(*map(sub, astuple(self), astuple(other)))


def _per_phase() -> dict[str, int]:
    return dict.fromkeys(Phase, 0)


@dataclass
class Stats:
    """What one request cost. ``compute_s + stall_s`` is the wall time, but for what runs outside both.

    ``transfer_s`` is how long the copy lane was busy, ``overlap_s`` how much of that the compute lane was at work too.
    ``hits`` and ``misses`` count the experts that a layer asked for, by the ``Phase``.
    """

    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    hits: dict[str, int] = field(default_factory=_per_phase)
    misses: dict[str, int] = field(default_factory=_per_phase)
    bytes: ByteCounts = field(default_factory=ByteCounts)
    wall_s: float = 0.0
    compute_s: float = 0.0
    stall_s: float = 0.0
    transfer_s: float = 0.0
    overlap_s: float = 0.0

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between two output tokens of a sequence, None before the second."""
        return sum(self.itl_s) / len(self.itl_s) if self.itl_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second of wall time, None where there is neither."""
        return self.output_tokens / self.wall_s if self.output_tokens and self.wall_s else None

    def hit_rate(self, phase: Phase | None = None) -> float | None:
        """Share of the experts asked for that were READY, in one phase or in both; None when none was asked for."""
        phases = [phase] if phase else list(Phase)
        hits = sum(self.hits[one] for one in phases)
        asked = hits + sum(self.misses[one] for one in phases)
        return hits / asked if asked else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, derived values included, as one flat JSON-able dictionary."""
        flat: dict[str, Any] = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "tokens_per_s": self.tokens_per_s}
        flat |= {"itl_s": list(self.itl_s), "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        flat["hit_rate"] = self.hit_rate()
        for phase in Phase:
            flat[f"hits_{phase}"] = self.hits[phase]
            flat[f"misses_{phase}"] = self.misses[phase]
            flat[f"hit_rate_{phase}"] = self.hit_rate(phase)
        flat |= {f"bytes_{kind}": nbytes for kind, nbytes in asdict(self.bytes).items()}
        flat["bytes_total"] = self.bytes.total
        return flat | {f"{name}_s": getattr(self, f"{name}_s") for name in _TIMES}

    def __str__(self) -> str:
        rows = [
            ("tokens", f"{self.prompt_tokens} in, {self.output_tokens} out"),
            ("TTFT", _seconds(self.ttft_s)),
            ("TPOT", _seconds(self.tpot_s)),
            ("tokens/s", "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f}"),
            ("hit rate", ", ".join(f"{phase} {_percent(self.hit_rate(phase))}" for phase in Phase)),
            *((f"MB {kind.replace('_', ' ')}", f"{nbytes / 1e6:.1f}") for kind, nbytes in asdict(self.bytes).items()),
            *((name, _seconds(getattr(self, f"{name}_s"))) for name in _TIMES),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


_TIMES = ("wall", "compute", "stall", "transfer", "overlap")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f} s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


class Meter:
    """Collects the figures of one request. ``copied`` may be called by any thread, all else by one.

    ``clock`` returns seconds; the copy engine must use the same one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._compute = _Section(self._enter_compute, self._leave_compute)
        self._stall = _Section(self._enter_stall, self._leave_stall)
        self._idle = _Section(self._enter_idle, self._leave_idle)
        self._computing = False
        self._stalling = False
        self.reset()

    def reset(self) -> None:
        """Forgets all figures. A section that is open goes on, counted from now."""
        self._since = self._clock()
        self._stats = Stats()
        self._timeline = Timeline(self._since)
        if self._computing and not self._stalling:
            self._timeline.start_compute(self._since)
        self._begun: float | None = None
        self._ended: float | None = None
        self._idle_since: float | None = None
        self._ttfts: list[float] = []
        self._last_token: dict[Hashable, float] = {}

    def begin_request(self) -> None:
        """Forgets all figures and starts the wall clock. Ends a section that an interrupt has left open."""
        self._computing = self._stalling = False
        self.reset()
        self._begun = self._since

    def end_request(self) -> None:
        """Stops the wall clock."""
        self._ended = self._clock()

    def prompt(self, num_tokens: int) -> None:
        """Counts the tokens of a prompt."""
        self._stats.prompt_tokens += num_tokens

    def token(self, sequence: Hashable = None) -> None:
        """Notes a token of ``sequence``: its first gives TTFT (the mean over sequences), the others an ITL each."""
        now = self._clock()
        last = self._last_token.get(sequence)
        if last is not None:
            self._stats.itl_s.append(now - last)
        elif self._begun is not None:
            self._ttfts.append(now - self._begun)
        self._last_token[sequence] = now
        self._stats.output_tokens += 1

    def outputs(self, num_tokens: int) -> None:
        """Counts output tokens whose times are kept elsewhere."""
        self._stats.output_tokens += num_tokens

    def compute(self) -> AbstractContextManager[None]:
        """The compute lane is busy inside, except inside ``stall()``. Not nestable."""
        return self._compute

    def stall(self) -> AbstractContextManager[None]:
        """The compute lane waits for a copy inside; within ``compute()`` it interrupts that. Not nestable."""
        return self._stall

    def idle(self) -> AbstractContextManager[None]:
        """The request waits for its caller inside: neither wall time, nor TTFT, nor ITL grow. Not nestable."""
        return self._idle

    def copied(self, started: float, finished: float, nbytes: int) -> None:
        """Notes that a copy ran from ``started`` to ``finished``; its bytes are counted when their use is known."""
        self._timeline.add_copy(started, finished)

    def stalled(self, started: float, finished: float) -> None:
        """Notes that the device, not the host, waited for a copy.

        The part of that time within ``compute()`` becomes stall time, even if the section has ended since. The rest is
        accounted for already: the host itself was in ``stall()``, or nothing was computed.
        """
        waited_s = self._timeline.add_stall(started, min(finished, self._clock()))
        self._stats.compute_s -= waited_s
        self._stats.stall_s += waited_s

    def hit(self, phase: Phase, n: int = 1) -> None:
        """Counts ``n`` experts that were READY when their layer asked for them."""
        if n:
            self._stats.hits[phase] += n

    def miss(self, phase: Phase, n: int = 1) -> None:
        """Counts ``n`` experts that were not READY when their layer asked for them."""
        if n:
            self._stats.misses[phase] += n

    @property
    def bytes(self) -> ByteCounts:
        """The live counts of this request, to whose fields bytes are added once it is known what they were good for."""
        return self._stats.bytes

    def snapshot(self) -> Stats:
        """The figures so far, open sections included, as data of its own."""
        now = self._clock()
        stats, open_s = self._stats, now - self._since
        until = next(time for time in (self._ended, self._idle_since, now) if time is not None)
        transfer, overlap = self._timeline.totals(until)
        return replace(
            stats,
            ttft_s=sum(self._ttfts) / len(self._ttfts) if self._ttfts else None,
            itl_s=list(stats.itl_s),
            hits=dict(stats.hits),
            misses=dict(stats.misses),
            bytes=replace(stats.bytes),
            wall_s=0.0 if self._begun is None else until - self._begun,
            compute_s=stats.compute_s + (open_s if self._computing and not self._stalling else 0.0),
            stall_s=stats.stall_s + (open_s if self._stalling else 0.0),
            transfer_s=transfer,
            overlap_s=overlap,
        )

    def _enter_compute(self) -> None:
        self._computing = True
        self._start_compute(self._clock())

    def _leave_compute(self) -> None:
        self._stop_compute(self._clock())
        self._computing = False

    def _enter_stall(self) -> None:
        now = self._clock()
        if self._computing:
            self._stop_compute(now)
        self._stalling, self._since = True, now

    def _leave_stall(self) -> None:
        now = self._clock()
        self._stats.stall_s += now - self._since
        self._stalling = False
        if self._computing:
            self._start_compute(now)

    def _enter_idle(self) -> None:
        self._idle_since = self._clock()

    def _leave_idle(self) -> None:
        """Moves what the clocks of the request started from, as if the caller had taken no time."""
        assert self._idle_since is not None and self._begun is not None
        away = self._clock() - self._idle_since
        self._idle_since = None
        self._begun += away
        for sequence in self._last_token:
            self._last_token[sequence] += away

    def _start_compute(self, now: float) -> None:
        self._since = now
        self._timeline.start_compute(now)

    def _stop_compute(self, now: float) -> None:
        self._stats.compute_s += now - self._since
        self._timeline.stop_compute(now)


class _Section:
    """A context manager that can be entered again and again, at the price of two calls."""

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self._enter = enter
        self._leave = leave

    def __enter__(self) -> None:
        self._enter()

    def __exit__(self, *exc_info: object) -> None:
        self._leave()
