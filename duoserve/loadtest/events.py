"""Server-sent events, as the standard has them: from the bytes of an answer to the data of each event."""

from __future__ import annotations

import codecs
import io
from collections.abc import AsyncIterable, AsyncIterator


async def event_data(parts: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """The data of each event that has any, as soon as its empty line has come; of the last, that may be missing.

    Lines end with CR, LF or both, and nowhere else: JSON may have other characters that some take for ends of lines.
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
    """The lines without their ends; a byte order mark in front of the first is no part of it."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("replace"), translate=True)
    rest = ""
    async for part in parts:
        *lines, rest = (rest + decoder.decode(part)).split("\n")
        for line in lines:
            yield line
    *lines, rest = (rest + decoder.decode(b"", final=True)).split("\n")
    for line in [*lines, rest]:
        yield line
