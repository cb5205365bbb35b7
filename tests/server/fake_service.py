"""A service that says what a script tells it to: pieces, pauses, failures. It notes what was asked and cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from duoserve.errors import ClosedError, RequestError
from duoserve.interface import Objectives, Piece, ServiceFigures, ServiceState, Times, TokenLogprobs
from duoserve.metrics import Stats
from duoserve.text.tokenizer import Tokenizer
from tests.helpers.small_tokenizers import byte_level_tokenizer

VOCAB = 291
CONTEXT = 64

Step = Piece | float | Exception  # a piece, seconds to wait, or what is raised


def spoken(*texts: str, finish: str = "stop") -> list[Step]:
    """A piece of one token for each text."""
    last = len(texts) - 1
    return [Piece(text, (65 + n,), (), finish if n == last else None) for n, text in enumerate(texts)]


class FakeTemplate:
    """Joins what was said by roles in angle brackets."""

    def render(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        for message in messages:
            if message["content"].startswith("unrenderable"):
                raise RequestError(f"the chat template refuses {message['content']}")
        said = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return said + ("<assistant>" if add_generation_prompt else "")


@dataclass
class FakeModel:
    """The model's face."""

    tokenizer: Tokenizer | None = field(default_factory=lambda: Tokenizer(byte_level_tokenizer()))
    chat_template: FakeTemplate | None = field(default_factory=FakeTemplate)
    max_context: int = CONTEXT
    policy: str = "lru"


class FakeStream:
    """Plays one script."""

    def __init__(
        self, service: FakeService, steps: Sequence[Step], objectives: Objectives, arrived: float | None
    ) -> None:
        self._service = service
        self._steps = iter(steps)
        self.objectives = objectives
        self.times = Times(time.monotonic() if arrived is None else arrived)
        self.cancelled_at: float | None = None
        self.over = False

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Piece:
        while not self.over:
            step = next(self._steps)
            if isinstance(step, Piece):
                return self._given(step)
            if isinstance(step, Exception):
                self._end("error")
                raise step
            await self._pause(step)
        raise StopAsyncIteration

    def cancel(self) -> None:
        if not self.over:
            self.cancelled_at = time.monotonic()
            self._end("abort")

    def _given(self, piece: Piece) -> Piece:
        now = time.monotonic()
        self.times = replace(self.times, admitted=self.times.admitted or now, first_token=self.times.first_token or now)
        if piece.finish_reason:
            self._end(piece.finish_reason)
        return piece

    async def _pause(self, seconds: float) -> None:
        """Ends early, with ClosedError, when the service is ended."""
        try:
            async with asyncio.timeout(seconds):
                await self._service.ended.wait()
        except TimeoutError:
            return
        self._end("error")
        raise ClosedError("the service has been shut down")

    def _end(self, how: str) -> None:
        self.over = True
        self._service.finished[how] = self._service.finished.get(how, 0) + 1


class FakeService:
    """Plays ``script``: called with a request's number, it gives the steps, or raises a refusal."""

    def __init__(
        self,
        script: Callable[[int], Sequence[Step]] | None = None,
        model: FakeModel | None = None,
        objectives: Objectives | None = None,
    ) -> None:
        self.script = script or (lambda number: spoken("Hello", " world"))
        self.model = model or FakeModel()
        self.state = ServiceState.READY
        self.capacity = 272
        self.objectives = objectives or Objectives()
        self.asked: list[dict[str, Any]] = []
        self.streams: list[FakeStream] = []
        self.finished: dict[str, int] = {}
        self.ended = asyncio.Event()
        self.stats = Stats()
        self.closed = False

    async def submit(
        self, prompt, params, objectives=None, *, logprobs=None, goes_on=False, arrived=None
    ) -> FakeStream:
        if self.state is not ServiceState.READY:
            raise ClosedError("the service takes no more requests")
        bad = next((token for token in prompt if not 0 <= token < VOCAB), None)
        if bad is not None or not prompt:
            raise RequestError(f"token id {bad} lies outside the vocabulary" if prompt else "the prompt is empty")
        steps = self.script(len(self.streams))
        asked = {"prompt": list(prompt), "params": params, "objectives": objectives, "logprobs": logprobs}
        self.asked.append(asked | {"goes_on": goes_on})
        self.streams.append(FakeStream(self, steps, objectives.or_else(self.objectives), arrived))
        return self.streams[-1]

    async def drain(self, seconds: float) -> None:
        self.state = ServiceState.DRAINING
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(stream.over for stream in self.streams):
            await asyncio.sleep(0.01)
        self.ended.set()

    async def close(self) -> None:
        self.closed = True
        self.ended.set()

    def figures(self) -> ServiceFigures:
        running = sum(not stream.over for stream in self.streams)
        return ServiceFigures(self.state, running, 2, 0.25, self.stats, dict(self.finished), 3, 4, 5, 6)


def with_logprobs(text: str, token_id: int, finish: str | None = None) -> Piece:
    """A piece with its token's log-probability, and that of the two likeliest."""
    tops = ((token_id, -0.25), (200, float("-inf")))
    return Piece(text, (token_id,), (TokenLogprobs(token_id, -0.25, tops),), finish)


def script_of(*steps: Step, refuse: Exception | None = None) -> Callable[[int], Sequence[Step]]:
    """The same for every request; a refusal instead, where there is one."""

    def play(number: int) -> Sequence[Step]:
        if refuse is not None:
            raise refuse
        return steps

    return play


def hoped(ttft_s: float | None, tpot_s: float | None) -> Objectives:
    """Objectives, by place."""
    return Objectives(ttft_s, tpot_s)
