"""Connections on which nothing comes: they are closed, and whoever does ask is served."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.server.fake_service import script_of, spoken

ROOT = Path(__file__).parents[2]
FEW_FILES = """
import asyncio, resource
from duoserve.server import connections
from duoserve.server.run import serve
from duoserve.server.settings import ServerSettings
from tests.server.fake_service import FakeService

connections.HEAD_SECONDS = 1.0
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200))
say = lambda url: print(url, resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
serve(ServerSettings(name="x", port=0), FakeService, say)
"""


@pytest.fixture
def server(served, monkeypatch):
    monkeypatch.setattr("duoserve.server.connections.HEAD_SECONDS", 0.4)
    return served(script_of(1.0, *spoken("late")))


def connected(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def closed_after(connection, text):
    """The seconds until the server closes, while ``text`` is sent byte by byte, as often as that takes."""
    began = time.monotonic()
    connection.settimeout(0.05)
    with suppress(ConnectionError):
        while time.monotonic() < began + 5:
            if text:
                connection.send(text[:1])
                text = text[1:]
            with suppress(TimeoutError):
                if not connection.recv(1 << 16):
                    break
    return time.monotonic() - began


@pytest.mark.parametrize("text", [b"", b"GET /" + b"x" * 1000], ids=["nothing", "byte by byte"])
@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["the first", "the second"])
def test_a_request_that_does_not_come_is_not_waited_for(server, before, text):
    with connected(server.url) as connection:
        if before:
            connection.sendall(before)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert 0.3 < closed_after(connection, text) < 2.0


def test_an_answer_may_take_longer_than_a_request(server):
    assert server.complete().json()["choices"][0]["text"] == "late"
    assert server.complete().status_code == 200


def test_idle_connections_up_to_the_limit_of_files_end_no_service():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", FEW_FILES], cwd=ROOT, **pipes) as running,
        ExitStack() as idle,
    ):
        idle.callback(running.kill)
        url, limit = running.stdout.readline().split()
        assert int(limit) == 200
        for _ in range(260):
            idle.enter_context(connected(url))
            time.sleep(0.002)
        until = time.monotonic() + 10
        status = None
        while status != 200 and time.monotonic() < until:
            with suppress(httpx.TransportError):
                status = httpx.get(f"{url}/health", timeout=1).status_code
        running.terminate()
        assert (status, running.wait(10), running.stderr.read()) == (200, 0, "")
