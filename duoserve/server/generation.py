"""The running choices of one request: submitted together, their pieces merged as they come, cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from duoserve.interface import Piece, Times
from duoserve.sampling import SamplingParams
from duoserve.server.answers import ChoiceWriter
from duoserve.server.asking import Asked
from duoserve.server.backend import RequestStream, Service
from duoserve.server.records import Record, RequestLog


@dataclass(eq=False)
class Choice:
    """One choice: the stream of its tokens, the writer of its answer, and its record in the log."""

    stream: RequestStream
    writer: ChoiceWriter
    record: Record


class Event(NamedTuple):
    """A new piece of one choice, and the tokens that the choice has with it; its record may count later ones too."""

    choice: Choice
    piece: Piece
    output_tokens: int


class Generation:
    """Begins to read all ``choices`` at once; must be closed, which stops the work on those that have not ended."""

    def __init__(self, choices: Sequence[Choice], prompt_tokens: int, request_log: RequestLog) -> None:
        self.choices = choices
        self.prompt_tokens = prompt_tokens
        self._request_log = request_log
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._open = len(choices)
        self._tasks = [asyncio.create_task(self._read(choice)) for choice in choices]

    @property
    def finished(self) -> bool:
        """Whether every choice has given its last piece."""
        return self._open == 0

    @property
    def output_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.record.output_tokens for choice in self.choices)

    async def next(self, seconds: float | None) -> Event | None:
        """The next piece of any choice; None if none comes within ``seconds``. Raises what a stream raised."""
        try:
            async with asyncio.timeout(seconds):
                event = await self._events.get()
        except TimeoutError:
            return None
        if isinstance(event, Exception):
            raise event
        self._open -= event.piece.finish_reason is not None
        return event

    def close(self) -> None:
        """Cancels the choices that still run; doing so twice is harmless."""
        for task, choice in zip(self._tasks, self.choices, strict=True):
            if not task.done():
                choice.stream.cancel()
                task.cancel()
            self._request_log.end(choice.record, "abort")

    async def _read(self, choice: Choice) -> None:
        try:
            async for piece in choice.stream:
                self._request_log.piece(choice.record, piece)
                if piece.finish_reason is not None:
                    self._request_log.end(choice.record, piece.finish_reason)
                self._events.put_nowait(Event(choice, piece, choice.record.output_tokens))
        except Exception as error:
            self._request_log.end(choice.record, "error")
            self._events.put_nowait(error)


class Wanted(NamedTuple):
    """A choice to be submitted. ``goes_on``: its text goes on from the prompt's."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    writer: ChoiceWriter
    goes_on: bool


async def begin(
    service: Service, request_log: RequestLog, name: str, wanted: Sequence[Wanted], asked: Asked
) -> Generation:
    """Submits all choices or none: if one is refused, the others are cancelled and the refusal is raised."""
    streams = await _all_or_none(
        [
            service.submit(
                one.prompt_ids,
                one.params,
                asked.objectives,
                logprobs=asked.logprobs,
                goes_on=one.goes_on,
                arrived=asked.arrived,
            )
            for one in wanted
        ]
    )
    choices = []
    for place, (stream, one) in enumerate(zip(streams, wanted, strict=True)):
        record = Record(f"{name}-{place}", len(one.prompt_ids), stream.objectives, partial(_times, stream))
        request_log.begin(record)
        choices.append(Choice(stream, one.writer, record))
    return Generation(choices, sum({id(one.prompt_ids): len(one.prompt_ids) for one in wanted}.values()), request_log)


def _times(stream: RequestStream) -> Times:
    return stream.times


async def _all_or_none(submissions: Sequence[Coroutine[Any, Any, RequestStream]]) -> list[RequestStream]:
    """Submits all at once: one after another, each would wait for a step of the engine and be prefilled alone."""
    tasks = [asyncio.create_task(one) for one in submissions]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(found, BaseException):
                found.cancel()
        raise
