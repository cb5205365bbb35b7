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
    """A prompt, its parameters, and what has become of it so far; ``finish_reason`` is None until it has ended.

    The engine gives it its ``number``, from 0 in the order of arrival. ``num_logprobs`` is how many of the likeliest
    tokens to report at each place, None: no log-probabilities. Times are seconds on the engine's clock, None for what
    has not happened.
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
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    def room(self, answer_room: int) -> int:
        """Tokens of context that it starts with room for: ``answer_room`` beyond those known, at most all it needs."""
        return min(self.num_tokens, self.num_known + answer_room)

    @property
    def may_grow(self) -> bool:
        """Whether it may come to need more room in the KV cache than it has; its last token needs none."""
        return self.kv.room < self.num_tokens - 1

    @property
    def next_ids(self) -> list[int]:
        """The token that a decode step computes next: its last, or the first that is no longer in the KV cache."""
        place = self.kv.length - len(self.prompt_ids)
        return self.output_ids[place : place + 1]

    @property
    def caught_up(self) -> bool:
        """Whether all of its tokens are in the KV cache, so that the next logits are those of a new token."""
        return self.kv.length == self.num_known

    @property
    def attained(self) -> bool:
        """Whether its tokens so far have met its objectives: the first token, and the others on average."""
        if self.arrived is None or self.first_token is None or self.last_token is None:
            return False
        others = len(self.output_ids) - 1
        tpot_s = (self.last_token - self.first_token) / others if others else None
        return self.objectives.met(self.first_token - self.arrived, tpot_s)

    def finish(self, reason: FinishReason) -> None:
        """Ends the request before its next token.

        The first reason given stays, except that "stop" replaces "length": its last token may complete a stop string.
        """
        if self.finish_reason is None or (self.finish_reason, reason) == ("length", "stop"):
            self.finish_reason = reason


class Produced(NamedTuple):
    """The result of a step for one request: a ``token``, or the ``error`` that has ended the request.

    An error and its causes come without tracebacks, as several requests may share one cause.
    """

    request: Request
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    error: DuoServeError | None = None
