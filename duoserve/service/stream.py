"""One request of a service, as its caller sees it: an asynchronous iterator of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from duoserve.errors import DuoServeError
from duoserve.interface import Objectives, Piece, Times
from duoserve.request import Request


class Stream:
    """Pieces of text as they come; the last has a ``finish_reason``. For one task of the event loop that it is made in.

    Iterating raises the error that has ended the request: CopyError or another DuoServeError of its own, or ClosedError
    if the service has ended. After ``cancel`` the iteration just ends. A request goes on while its stream is not read;
    who leaves it before its end calls ``cancel``, or drops the last reference to it, which does the same.
    """

    def __init__(self, request: Request, cancel: Callable[[Request], None]) -> None:
        self._request = request
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | DuoServeError | None] = asyncio.Queue()
        self._finished: float | None = None
        self._ended = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._request.prompt_ids)

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self._request.output_ids)

    @property
    def objectives(self) -> Objectives:
        """The request's objectives, and the service's where it brought none."""
        return self._request.objectives

    @property
    def times(self) -> Times:
        """When each stage of the request was reached."""
        request = self._request
        return Times(request.arrived or 0.0, request.admitted, request.first_token, self._finished)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        item = await self._queue.get()
        self._ended = not isinstance(item, Piece) or item.finish_reason is not None
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, DuoServeError):
            raise item
        return item

    def cancel(self) -> None:
        """Stops the request before the next step; may be called at any time, any number of times."""
        self._cancel(self._request)

    def give(self, item: Piece | DuoServeError | None, finished: float | None) -> bool:
        """Takes the next piece, an error, or None for the end, from the service's thread.

        Gives False if the event loop has been closed. An error and its causes must come without tracebacks.
        """
        self._finished = finished
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            return False
        return True
