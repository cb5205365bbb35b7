"""Connections: none waits for ever for a request, and there are fewer than the process may have files open."""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_SECONDS = 10.0  # for the first line and the headers of a request
MOST_FILES = 1 << 16


def raise_file_limit() -> None:
    """Lets the process have as many files open as it may by itself, up to MOST_FILES: shells still begin with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Connection(H11Protocol):
    """uvicorn's connection, which would wait for ever for its first request, and for one that comes byte by byte.

    Connections take a quarter of the files that the process may have open at most; further ones are closed at once. If
    none were left, asyncio would log an error for each place in the queue of connections that wait to be accepted.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4:
            transport.close()
        self._await_request(None)

    def on_response_complete(self) -> None:
        """Begins to wait for the next request."""
        answered = self.cycle
        super().on_response_complete()
        self._await_request(answered)

    def _await_request(self, last: RequestResponseCycle | None) -> None:
        self.loop.call_later(HEAD_SECONDS, self._close_unless_asked, last)

    def _close_unless_asked(self, last: RequestResponseCycle | None) -> None:
        """Closes the connection if no request has come after ``last``."""
        if self.cycle is last:
            self.transport.close()
