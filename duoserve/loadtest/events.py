"""Parses server-sent events as the standard defines them: from the bytes of an answer to the data of each event."""

from __future__ import annotations

import codecs
import io
from collections.abc import AsyncIterable, AsyncIterator


async def event_data(parts: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """The data of each event that has any, as soon as the event's empty line has come; the last may do without one.

    Lines end only with CR, LF or both: JSON may contain other characters at which, for one, str.splitlines splits.
    """
    data: list[str] = []
    async for line in _lines(parts):
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)


async def _lines(parts: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """The lines without their ends, and without a byte order mark at the very start."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("replace"), translate=True)
    rest = ""
    async for part in parts:
        *lines, rest = (rest + decoder.decode(part)).split("\n")
        for line in lines:
            yield line
    *lines, rest = (rest + decoder.decode(b"", final=True)).split("\n")
    for line in [*lines, rest]:
        yield line
