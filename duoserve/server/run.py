"""From settings to a process that listens, loads, serves, and ends in good order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from duoserve.errors import ConfigError
from duoserve.server.app import make_app
from duoserve.server.backend import Service
from duoserve.server.connections import Connection, raise_file_limit
from duoserve.server.host import ServiceLoader
from duoserve.server.settings import ServerSettings

LAST_WORDS_S = 5.0  # the time for answers that were cut off to tell their clients
BACKLOG = 512  # connections that wait to be accepted


def serve(settings: ServerSettings, load: Callable[[], Service], ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. The socket listens before ``load`` is called; ``ready`` gets the URL after that.

    A signal that comes while ``load`` runs ends the process, with exit code 0, instead of this call.
    Raises what ``load`` raises, and ConfigError if it cannot listen at the address.
    """
    raise_file_limit()
    loader = ServiceLoader(load)
    listening = listen(settings.host, settings.port)
    with listening:
        asyncio.run(_serve(settings, loader, listening, ready))
    if loader.still_loads:
        _leave()


def _leave() -> NoReturn:
    """Ends the process at once: the interpreter's own end kills other threads, and inside torch that aborts it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError if there cannot be one.

    Its connections send at once, which asyncio sees to only for sockets that were made with a protocol's number: else
    the end of each answer, and each next event of a stream, would wait for the client to acknowledge what came before.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, TypeError) as error:  # TypeError: the host is not a name that can be looked up
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot listen on {host} port {port}: {why}; see --host and --port") from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    return listening


def url_of(listening: socket.socket) -> str:
    """The URL of a listening socket, for clients."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Listener(uvicorn.Server):
    """uvicorn's server, which lets the service drain while it waits for its connections to end."""

    def __init__(self, app: ASGIApp, loader: ServiceLoader, settings: ServerSettings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                backlog=BACKLOG,
                log_level="warning",
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=settings.max_header_bytes,
                timeout_graceful_shutdown=int(settings.shutdown_s + LAST_WORDS_S) + 1,
            )
        )
        self._loader = loader
        self._shutdown_s = settings.shutdown_s
        self._hurried = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the shutdown at the first signal, and hurries it at a second SIGINT."""
        if self.should_exit and sig == signal.SIGINT:
            self._hurried.set()  # not force_exit: with that, from Python 3.12 on, uvicorn still waits for connections
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, drains, and lets answers end, or cuts them off if hurried; then releases the model."""
        draining = asyncio.create_task(self._loader.drain(self._shutdown_s))
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as patience:
                hurrying = asyncio.create_task(self._cut_off(draining, patience))
                await super().shutdown(sockets)
        hurrying.cancel()
        with suppress(asyncio.CancelledError):
            await draining
        await self._loader.close()

    async def _cut_off(self, draining: asyncio.Task[None], patience: asyncio.Timeout) -> None:
        """Once hurried, ends all streams, and gives their clients LAST_WORDS_S to receive the error."""
        await self._hurried.wait()
        draining.cancel()
        await self._loader.close()
        patience.reschedule(asyncio.get_running_loop().time() + LAST_WORDS_S)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Lets SIGTERM and SIGINT begin the shutdown. They are not raised again after it: the process ends in order."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, partial(self.handle_exit, number, None))
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


async def _serve(
    settings: ServerSettings, loader: ServiceLoader, listening: socket.socket, ready: Callable[[str], None]
) -> None:
    listener = Listener(make_app(loader, settings), loader, settings)
    loading = asyncio.create_task(_load(loader, listener, partial(ready, url_of(listening))))
    await listener.serve(sockets=[listening])
    loading.cancel()
    if loader.failure is not None:
        raise loader.failure


async def _load(loader: ServiceLoader, listener: Listener, ready: Callable[[], None]) -> None:
    try:
        await loader.start()
    except Exception:
        listener.should_exit = True  # the loader keeps the failure, which is raised in the end
    else:
        ready()
