"""One prompt on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from duoserve.errors import DuoServeError
from duoserve.interface import FinishReason, Objectives, TokenLogprobs
from duoserve.kv_cache import SequenceKV
from duoserve.sampling import SamplingParams


@dataclass(eq=False)
class Request:
    """``finish_reason`` is None while it runs.

    ``number`` is the engine's, from 0 in the order of arrival. ``num_logprobs`` (None: none are wanted) is how many of
    the likeliest tokens to report at each place. Times are seconds on the engine's clock, None for what is to come.
    """

    prompt_ids: list[int]
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    kv: SequenceKV = field(default_factory=SequenceKV)
    number: int = -1
    objectives: Objectives = field(default_factory=Objectives)
    num_logprobs: int | None = None
    arrived: float | None = None
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    sent_back: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of context that the request may come to need."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def num_known(self) -> int:
        """Tokens of context that there are so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    def room(self, answer_room: int) -> int:
        """Tokens of context that it starts with room for: ``answer_room`` beyond those that it has."""
        return min(self.num_tokens, self.num_known + answer_room)

    @property
    def may_grow(self) -> bool:
        """Whether it may come to need more room than it has; its last token needs none."""
        return self.kv.room < self.num_tokens - 1

    @property
    def next_ids(self) -> list[int]:
        """What a decode step computes next: its last token, or the first of those whose room was taken from it."""
        place = self.kv.length - len(self.prompt_ids)
        return self.output_ids[place : place + 1]

    @property
    def caught_up(self) -> bool:
        """Whether all of its tokens are computed, so that the logits are those of a new one."""
        return self.kv.length == self.num_known

    @property
    def attained(self) -> bool:
        """Whether the tokens that it has came inside its objectives: the first, and the others on the average."""
        if self.arrived is None or self.first_token is None or self.last_token is None:
            return False
        others = len(self.output_ids) - 1
        tpot_s = (self.last_token - self.first_token) / others if others else None
        return self.objectives.met(self.first_token - self.arrived, tpot_s)

    def finish(self, reason: FinishReason) -> None:
        """Ends the request before its next token.

        The first reason given stays, but for the "length" of a request whose last token turns out to complete a stop
        string.
        """
        if self.finish_reason is None or (self.finish_reason, reason) == ("length", "stop"):
            self.finish_reason = reason


class Produced(NamedTuple):
    """What a step came to for one request: a ``token``, or the ``error`` that has ended it.

    An error, and its causes, come without tracebacks: several requests may be told of one cause.
    """

    request: Request
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    error: DuoServeError | None = None
