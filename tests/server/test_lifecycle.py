"""Loading, draining, dying: what clients are told meanwhile, and how the process ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from duoserve.errors import CheckpointError, ConfigError, MemoryBudgetError
from duoserve.interface import ServiceState
from duoserve.server.host import ServiceLoader
from duoserve.server.run import LAST_WORDS_S, listen, serve
from duoserve.server.settings import ServerSettings
from tests.server.conftest import serving, wait_ready
from tests.server.fake_service import FakeService, spoken


def test_the_socket_answers_503_while_the_model_loads():
    go = threading.Event()

    def load():
        go.wait(5)
        return FakeService()

    with serving(load) as server:
        answer = server.http.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        for answer in (server.complete(), server.http.get("/v1/models")):
            assert answer.status_code == 503 and "loading" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"] == "5"
        found = server.http.get("/status").json()
        assert found["state"] == "loading" and found["objectives"] == {"ttft_ms": None, "tpot_ms": None}
        assert server.http.get("/metrics").status_code == 200
        go.set()
        wait_ready(server)
        assert server.complete().status_code == 200


def test_a_dead_engine_is_a_503_everywhere(served):
    server = served()
    server.service.state = ServiceState.DEAD
    assert server.http.get("/health").status_code == 503
    for answer in (server.complete(), server.chat(), server.http.get("/v1/models"), server.post("/tokenize", {})):
        assert answer.status_code == 503 and "dead" in answer.json()["error"]["message"]
    assert server.http.get("/status").json()["state"] == "dead"


def test_a_shutdown_lets_short_requests_finish_and_tells_the_others(served):
    first, last = spoken("a", "b")
    scripts = [[first, 0.3, last], [first, 60.0, last]]
    server = served(lambda number: scripts[number], shutdown_s=0.8)
    ends = [[], []]

    def read(end):
        body = {"prompt": "a", "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            end += [line for line in answer.iter_lines() if line]

    readers = [threading.Thread(target=read, args=(end,)) for end in ends]
    for place, reader in enumerate(readers):
        reader.start()
        while len(server.service.streams) <= place:
            time.sleep(0.01)
    time.sleep(0.05)
    began = time.monotonic()
    server.stop()
    for reader in readers:
        reader.join(30)
    assert time.monotonic() - began > 0.7
    assert not any(reader.is_alive() for reader in readers)  # as they would be if the second were waited for
    assert json.loads(ends[0][-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
    error = json.loads(ends[1][-2].removeprefix("data: "))["error"]
    assert error["type"] == "service_unavailable_error"
    assert ends[0][-1] == ends[1][-1] == "data: [DONE]"
    assert server.service.closed


def wait_for_connections(monkeypatch, server):
    """Has a closed server wait until its connections are gone, as every Python does from 3.12.1 on."""

    async def wait_closed(_):
        while server.listener.server_state.connections:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(asyncio.base_events.Server, "wait_closed", wait_closed)


def interrupt(server):
    """Ctrl-C, as the process's first thread hears it."""
    server.listener.servers[0].get_loop().call_soon_threadsafe(server.listener.handle_exit, signal.SIGINT, None)


def test_a_second_interrupt_cuts_answers_off_and_they_are_told(served, monkeypatch):
    first, last = spoken("a", "b")
    server = served(lambda number: [first, 60.0, last], shutdown_s=60.0)
    wait_for_connections(monkeypatch, server)
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert '"text":"a"' in next(lines)
        interrupt(server)
        time.sleep(0.3)
        assert server.thread.is_alive()  # one lets it finish
        interrupt(server)
        began = time.monotonic()
        assert json.loads(next(lines).removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
        assert next(lines) == "data: [DONE]"
    server.thread.join(10)
    assert time.monotonic() - began < LAST_WORDS_S and server.service.closed


def test_a_second_interrupt_waits_for_no_client_that_says_nothing(served, monkeypatch):
    monkeypatch.setattr("duoserve.server.run.LAST_WORDS_S", 0.2)
    server = served(shutdown_s=60.0)
    wait_for_connections(monkeypatch, server)
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as silent:
        silent.sendall(head)
        time.sleep(0.1)  # for the server to begin to read
        interrupt(server)
        interrupt(server)
        server.thread.join(3)
        assert not server.thread.is_alive() and server.service.closed


def failing(error):
    def load():
        raise error

    return load


def settings(**changes):
    return ServerSettings(**({"name": "x", "port": 0} | changes))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (CheckpointError("shard 2 is cut short"), CheckpointError, "shard 2 is cut short"),
        (MemoryError(), MemoryBudgetError, "out of memory while the model was loaded"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), MemoryBudgetError, "out of memory"),
    ],
)
def test_what_loading_raises_ends_the_server(error, kind, message):
    ready = []
    with pytest.raises(kind, match=message):
        serve(settings(), failing(error), ready.append)
    assert ready == []


LOADS_FOR_EVER = """
import torch
from duoserve.server.run import serve
from duoserve.server.settings import ServerSettings

def load():
    print("loading", flush=True)
    print("flushed in the end")
    matrix = torch.eye(256)
    while True:
        matrix = matrix @ matrix

serve(ServerSettings(name="x", port=0), load, print)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_process_in_order(number):
    """An interpreter that ends kills its other threads; inside torch that would abort the process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LOADS_FOR_EVER], **pipes) as running:
        try:
            assert running.stdout.readline() == "loading\n"
            running.send_signal(number)
            assert running.wait(20) == 0
            assert (running.stdout.read(), running.stderr.read()) == ("flushed in the end\n", "")
        finally:
            running.kill()


def test_connections_send_at_once() -> None:
    """Else the body of an answer waits some 40 ms until the client has acknowledged its head."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_taken_port_is_refused_before_anything_is_loaded():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1 port \d+"):
        serve(settings(port=taken.getsockname()[1]), failing(AssertionError("loaded")), print)


@pytest.mark.parametrize("host", ["no such host", "ü" * 80, "a\0b"])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(ConfigError, match=r"cannot listen on .* port 0: .*; see --host"):
        listen(host, 0)


def test_settings_are_checked():
    nan, inf = float("nan"), float("inf")
    seconds = [{"shutdown_s": -1}, {"shutdown_s": nan}, {"shutdown_s": inf}, {"ping_s": 0}, {"ping_s": nan}]
    keys = [{"api_key": ""}, {"api_key": " s3cret"}, {"api_key": "s3cret\n"}]
    keys += [{"api_key": "s3cret\udcff"}, {"api_key": "s3\ncret"}, {"api_key": "s3\0cret"}]
    for wrong in ({"port": 70_000}, {"host": ""}, {"name": "mod\udcffel"}, *keys, *seconds):
        with pytest.raises(ConfigError):
            settings(**wrong)


def test_a_host_whose_model_could_not_be_loaded_is_dead():
    loader = ServiceLoader(failing(CheckpointError("broken")))
    with pytest.raises(CheckpointError):
        asyncio.run(loader.start())
    assert loader.state == ServiceState.DEAD
