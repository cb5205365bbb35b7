"""Records of requests: of all that run, and of the last that ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from duoserve.interface import FinishReason, Objectives, Piece, Times

KEPT = 512


@dataclass(eq=False)
class Record:
    """The record of one choice. Times are seconds of ``time.monotonic``; ``ask`` gives those known so far."""

    id: str
    prompt_tokens: int
    objectives: Objectives
    ask: Callable[[], Times]
    output_tokens: int = 0
    outcome: FinishReason | None = None  # once it is known
    last_token: float | None = None
    gaps: list[float] = field(default_factory=list)

    @property
    def times(self) -> Times:
        """When each stage of the request was reached, as known now or at its end."""
        return self.ask()

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to its first token."""
        first = self.times.first_token
        return None if first is None else first - self.times.arrived

    @property
    def e2e_s(self) -> float | None:
        """Seconds from its arrival to its last token, once there is one."""
        return None if self.outcome is None or self.last_token is None else self.last_token - self.times.arrived

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between its tokens, None before the second."""
        first, last = self.times.first_token, self.last_token
        return None if first is None or last is None or self.output_tokens < 2 else (last - first) / self.later_tokens

    @property
    def later_tokens(self) -> int:
        """Its tokens after the first."""
        return self.output_tokens - 1

    @property
    def attained(self) -> bool | None:
        """Whether it has met its objectives so far; None without any, or before there is anything to compare."""
        took, hoped = (self.ttft_s, self.tpot_s), (self.objectives.ttft_s, self.objectives.tpot_s)
        comparable = any(None not in pair for pair in zip(took, hoped, strict=True))
        return self.objectives.met(*took) if comparable else None


class RequestLog:
    """The requests that run, and the last ``KEPT`` that ended, without their gaps. ``listeners`` hear of every end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live: dict[Record, None] = {}
        self._ended: deque[Record] = deque(maxlen=KEPT)
        self.listeners: list[Callable[[Record], None]] = []

    @property
    def live(self) -> Iterable[Record]:
        """The requests that run, in the order of their arrival."""
        return tuple(self._live)

    @property
    def ended(self) -> Iterable[Record]:
        """The last requests that ended, the latest last."""
        return tuple(self._ended)

    def begin(self, record: Record) -> None:
        """Notes that a request was taken."""
        self._live[record] = None

    def piece(self, record: Record, piece: Piece) -> None:
        """Notes a new ``piece`` of a request; tokens that come together have no gap between them."""
        record.output_tokens += len(piece.token_ids)
        if not piece.token_ids:
            return
        now = self._clock() if record.last_token is not None else (record.times.first_token or self._clock())
        if record.last_token is not None:
            record.gaps += [max(0.0, now - record.last_token)] + [0.0] * (len(piece.token_ids) - 1)
        record.last_token = now

    def end(self, record: Record, outcome: FinishReason) -> None:
        """Notes that a request ended; later outcomes of the same request are ignored."""
        if record in self._live:
            del self._live[record]
            times = record.times
            record.ask = lambda: times  # lets go of the stream that was asked before
            record.outcome = outcome
            self._ended.append(record)
            for listener in self.listeners:
                listener(record)
            record.gaps.clear()  # there is one for each token, which is too much to keep
