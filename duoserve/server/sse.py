"""Answers as server-sent events: chunks, pings during silence, and errors, as the status has been sent by then."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from duoserve.server.answers import Dialect, Head, answer, usage_of
from duoserve.server.asking import Asked
from duoserve.server.errors import noted
from duoserve.server.generation import Event, Generation

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def events(  # noqa: PLR0913, PLR0917
    first: Event | None,
    generation: Generation,
    dialect: Dialect,
    head: Head,
    asked: Asked,
    ping_s: float,
) -> AsyncIterator[bytes]:
    """The events of an answer whose ``first`` piece has come (None: not yet); always ends with ``DONE``."""
    try:
        yield PING if first is None else _chunk(first, dialect, head, asked.usage_so_far)
        while not generation.finished:
            found = await generation.next(ping_s)
            yield PING if found is None else _chunk(found, dialect, head, asked.usage_so_far)
        if asked.include_usage:
            usage = usage_of(generation.prompt_tokens, generation.output_tokens)
            yield event(answer(head, dialect.chunk_object, [], usage))
    except Exception as error:
        yield event(noted(error).body)
    yield DONE


def _chunk(found: Event, dialect: Dialect, head: Head, usage_so_far: bool) -> bytes:
    *opening, brought = found.choice.writer.deltas(found.piece)

    def written(delta: dict[str, Any], output_tokens: int) -> bytes:
        usage = usage_of(found.choice.record.prompt_tokens, output_tokens) if usage_so_far else None
        return event(answer(head, dialect.chunk_object, [delta], usage))

    before = found.output_tokens - len(found.piece.token_ids)
    return b"".join([*(written(delta, before) for delta in opening), written(brought, found.output_tokens)])
