"""What passes between a service and its callers: objectives, pieces of text, figures.

The engine's thread makes them and an event loop reads them, so all are immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf, nan
from numbers import Real
from typing import Literal

from duoserve.errors import ConfigError, RequestError
from duoserve.metrics import Stats
from duoserve.number_checks import checked_integer

MAX_LOGPROBS = 20  # this many of the likeliest tokens at a place can be reported at most
_SECONDS = "must be a finite number of seconds above 0, or None"
FinishReason = Literal["stop", "length", "abort", "error"]  # why a request has ended


class ServiceState(StrEnum):
    """Whether a service takes requests. ``DRAINING``: it only finishes those that it has. ``DEAD``: it has ended."""

    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


def _checked_seconds(name: str, value: object) -> float | None:
    """A number of any kind as a float, checked here: an error in the service's thread would end the service.

    Raises RequestError for what is not above 0 and finite.
    """
    if value is None:
        return None
    try:
        seconds = float(value) if isinstance(value, Real) and not isinstance(value, bool) else nan
    except OverflowError as error:
        raise RequestError(f"{name} is beyond all floats, but {_SECONDS}") from error
    if not 0 < seconds < inf:
        raise RequestError(f"{name} is {value!r}, but {_SECONDS}")
    return seconds


@dataclass(frozen=True)
class Objectives:
    """What a request hopes for, in seconds: its first token after ``ttft_s``, a later one every ``tpot_s``.

    Raises RequestError for what is not above 0 and finite.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ttft_s", _checked_seconds("ttft_s", self.ttft_s))
        object.__setattr__(self, "tpot_s", _checked_seconds("tpot_s", self.tpot_s))

    @classmethod
    def of_ms(cls, ttft_ms: float | None, tpot_ms: float | None) -> Objectives:
        """Objectives that are given in milliseconds, as people and HTTP requests give them."""
        return cls(*(None if limit is None else limit / 1000 for limit in (ttft_ms, tpot_ms)))

    def or_else(self, defaults: Objectives) -> Objectives:
        """These objectives; where one is None, that of ``defaults``."""
        return Objectives(
            defaults.ttft_s if self.ttft_s is None else self.ttft_s,
            defaults.tpot_s if self.tpot_s is None else self.tpot_s,
        )

    def met(self, ttft_s: float | None, tpot_s: float | None) -> bool:
        """Whether a first token after ``ttft_s`` and later ones every ``tpot_s`` meet these. None: not late yet."""
        pairs = (ttft_s, self.ttft_s), (tpot_s, self.tpot_s)
        return all(took is None or limit is None or took <= limit for took, limit in pairs)


@dataclass(frozen=True)
class ServiceSettings:
    """How a service shares the model among requests. At most ``max_batch`` run at once, and ``max_waiting`` wait.

    ``scheduler`` "slo" starts the request with the least slack first and slices prefills between decode steps; "fcfs"
    goes by arrival, a whole prefill at a time. ``admission`` "strict" refuses at once a request that would miss its
    objectives, except the first to come after some idle seconds; "late" serves it late. ``objectives`` are those of
    requests that bring none of their own.

    An answer starts with room for ``answer_room`` tokens in the KV cache and gets a page more whenever it has filled
    it: most answers end long before their limit. Where no room is left, the requests started last make way, and catch
    up later. Neither these, nor requests for which ``max_batch`` still has a place, count in ``max_waiting``.

    Raises ConfigError for a value of another kind, or out of range.
    """

    max_batch: int = 16
    max_waiting: int = 256
    admission: Literal["late", "strict"] = "late"
    objectives: Objectives = Objectives()
    scheduler: Literal["slo", "fcfs"] = "slo"
    answer_room: int = 256

    def __post_init__(self) -> None:
        for name, lowest in (("max_batch", 1), ("max_waiting", 0), ("answer_room", 1)):
            object.__setattr__(self, name, checked_integer(ConfigError, name, getattr(self, name), lowest))
        if not isinstance(self.objectives, Objectives):
            raise ConfigError(f"objectives is {self.objectives!r}, but must be Objectives")
        for name, value, known in (
            ("admission", self.admission, ("late", "strict")),
            ("scheduler", self.scheduler, ("slo", "fcfs")),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, known))}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logs of probabilities before any sampling rule: of ``token_id``, and of the likeliest at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text and tokens of a request. Only the last piece has a ``finish_reason``, "stop" or "length".

    ``text`` is empty while characters are incomplete or may begin a stop string, and without a tokenizer.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Times:
    """When each stage of a request was reached, in seconds of ``time.monotonic``; None: not yet."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class ServiceFigures:
    """Figures of a service since its start. ``finished`` counts requests by the reason why they ended.

    ``attained`` counts those that finished within all of their objectives, of ``with_objectives`` that had any;
    ``sent_back`` counts how often a request made way in the KV cache. ``stats`` are as for a single call, over all
    passes so far; their times and rates of one request mean nothing here.
    """

    state: ServiceState
    running: int
    waiting: int
    kv_usage: float
    stats: Stats
    finished: Mapping[FinishReason, int] = field(default_factory=dict)
    refused: int = 0
    attained: int = 0
    with_objectives: int = 0
    sent_back: int = 0
