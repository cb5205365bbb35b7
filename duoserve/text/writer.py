"""Turns one request's tokens into its text."""

from __future__ import annotations

from collections.abc import Sequence

from duoserve.errors import RequestError
from duoserve.request import Request
from duoserve.text.channels import Channels
from duoserve.text.tokenizer import IncrementalDecoder, StopStrings, Tokenizer


class Writer:
    """Turns one request's tokens into text and ends the request at a stop string.

    If the last permitted token completes one, the reason is "stop" all the same. Stop strings are not looked for in a
    channel's header (see channels.py), nor across one. The text goes on from that of the tokens ``behind``, and then
    keeps the space before its first word.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], behind: Sequence[int] = ()) -> None:
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, behind)
        self._channels = None if tokenizer is None else Channels(tokenizer)
        self._stop = StopStrings(stop)
        self._pieces: list[str] = []
        if stop and tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")

    def push(self, request: Request, token: int) -> str:
        """The text that became certain with ``token``; an end token has none, whatever the vocabulary says."""
        if self._decoder is None or self._channels is None or request.finish_reason == "stop":
            return ""
        piece, in_header = self._decoder.push(token), self._channels.in_header
        self._channels.push([token])
        if in_header:
            return self._write(request, piece)
        certain = self._stop.push(piece)
        return self._write(request, certain + self._stop.flush() if self._channels.in_header else certain)

    def rest(self, request: Request) -> str:
        """The text that was held back, for when no token follows."""
        if self._decoder is None or self._stop.found:
            return ""
        certain = self._stop.push(self._decoder.flush())
        return self._write(request, certain if self._stop.found else certain + self._stop.flush())

    def finish(self, request: Request) -> str | None:
        """The whole text, or None without a tokenizer."""
        self.rest(request)
        return None if self._decoder is None else "".join(self._pieces)

    def _write(self, request: Request, piece: str) -> str:
        if self._stop.found is not None:
            request.finish("stop")
        self._pieces.append(piece)
        return piece
