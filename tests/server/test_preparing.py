"""Texts that wait for others: they are told to come again, not that they are too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from duoserve.server.preparing import THREADS
from tests.helpers.fakes import PATIENCE_S
from tests.server.fake_service import FakeModel


class Slow:
    """A tokenizer that takes until ``open`` for prompts of that name."""

    def __init__(self) -> None:
        self.gates = {"held": threading.Event(), "late": threading.Event()}
        self.entered = threading.Semaphore(0)

    def encode(self, prompt: str) -> list[int]:
        if prompt in self.gates:
            self.entered.release()
            assert self.gates[prompt].wait(PATIENCE_S), "the test never opened the gate"
        return [65]

    def all_are_held(self) -> None:
        for _ in range(THREADS):
            assert self.entered.acquire(timeout=PATIENCE_S), "nobody came to the gate"


@pytest.fixture
def slow() -> Iterator[Slow]:
    text = Slow()
    yield text
    for gate in text.gates.values():
        gate.set()


def test_a_text_that_finds_no_thread_is_to_be_sent_again_and_not_to_be_shortened(served, slow):
    server = served(model=FakeModel(tokenizer=slow), text_s=0.2)
    with ThreadPoolExecutor(THREADS) as threads:
        held = [threads.submit(server.post, "/tokenize", {"prompt": "held"}) for _ in range(THREADS)]
        slow.all_are_held()
        refused = server.post("/tokenize", {"prompt": "hi"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["Retry-After"] == "5" and "shorten" not in refused.text
        for answer in held:
            assert answer.result().status_code == 400 and "longer than 0.2 s" in answer.result().text
    slow.gates["held"].set()
    assert server.post("/tokenize", {"prompt": "hi"}).json()["tokens"] == [65]


def test_the_wait_for_a_thread_is_not_a_texts_own_time(served, slow):
    server = served(model=FakeModel(tokenizer=slow), text_s=1.5)
    with ThreadPoolExecutor(THREADS + 1) as threads:
        held = [threads.submit(server.post, "/tokenize", {"prompt": "held"}) for _ in range(THREADS)]
        slow.all_are_held()
        late = threads.submit(server.post, "/tokenize", {"prompt": "late"})
        for gate in slow.gates.values():
            time.sleep(0.9)
            gate.set()
        assert {answer.result().status_code for answer in [*held, late]} == {200}
