"""The server in a thread of its own, on a free port, over a scripted service."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from duoserve.server.app import make_app
from duoserve.server.host import ServiceLoader
from duoserve.server.run import Listener, listen, url_of
from duoserve.server.settings import ServerSettings
from tests.server.fake_service import FakeService

NAME = "fake"


class InThread(Listener):
    """Signals reach a process's first thread alone, which is the test's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Serving:
    """A server that runs, and a client of it."""

    url: str
    service: Any
    listener: Listener
    thread: threading.Thread
    http: Any

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        return self.http.post(path, json=body, **options)

    def complete(self, **fields: Any) -> Any:
        return self.post("/v1/completions", {"prompt": "the cat", **fields})

    def chat(self, **fields: Any) -> Any:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields})

    def stop(self) -> None:
        self.listener.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextmanager
def serving(load: Callable[[], Any], **settings: Any) -> Iterator[Serving]:
    """Runs a server over what ``load`` gives, until the block ends."""
    wanted = ServerSettings(**({"name": NAME, "port": 0, "shutdown_s": 0.5, "ping_s": 5.0} | settings))
    listening = listen(wanted.host, wanted.port)
    loader = ServiceLoader(load)
    listener = InThread(make_app(loader, wanted), loader, wanted)

    async def run() -> None:
        loading = asyncio.create_task(loader.start())
        await listener.serve(sockets=[listening])
        await asyncio.gather(loading, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    url = url_of(listening)
    thread.start()
    with httpx.Client(base_url=url, timeout=10) as client:
        running = Serving(url, loader, listener, thread, client)
        try:
            yield running
        finally:
            running.stop()


def wait_ready(running: Serving) -> None:
    """Until the model is there; at most half a minute."""
    until = time.monotonic() + 30
    while running.http.get("/health").status_code != 200:
        assert time.monotonic() < until, "never ready"
        time.sleep(0.01)


@pytest.fixture
def served() -> Iterator[Callable[..., Serving]]:
    """Starts a server over a FakeService; called with a script and settings."""
    running: list[Any] = []

    def start(script: Any = None, *, model: Any = None, objectives: Any = None, **settings: Any) -> Serving:
        service = FakeService(script, model, objectives)
        context = serving(lambda: service, **settings)
        found = context.__enter__()
        running.append(context)
        found.service = service
        wait_ready(found)
        return found

    yield start
    for context in reversed(running):
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def lasting() -> Iterator[Serving]:
    """One server for all tests of a file that do not change what it does."""
    service = FakeService()
    with serving(lambda: service) as running:
        running.service = service
        wait_ready(running)
        yield running
