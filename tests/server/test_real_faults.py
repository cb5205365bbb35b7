"""Faults in the real engine, as clients of the server see them: who is told what, and what goes on."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from duoserve.errors import CopyError
from duoserve.moe_model import MoEModel
from duoserve.service.async_engine import AsyncEngine
from duoserve.text.chat_template import ChatTemplate
from tests.server.conftest import Serving, serving, wait_ready
from tests.server.fake_service import FakeModel

PROMPT, TOKENS = "Enter HAMLET", 12
PING_S, SLOW_S = 0.05, 0.3
ASKED = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


@dataclass
class Faults:
    """What happens to the model's copies and logits from now on; counted in waits for copies."""

    failing: int = 0
    slow: int = 0
    spoil: threading.Event = field(default_factory=threading.Event)

    def into(self, model: MoEModel) -> MoEModel:
        """The same model, at the mercy of these faults."""
        passes = model._runtime.engine._passes
        copies, decode = passes._scheduler._copies, passes.decode
        wait = copies.wait

        def faulty_wait(tickets: Any) -> Any:
            if self.failing:
                self.failing -= 1
                raise CopyError("expert 1/3: the disk does not answer")
            if self.slow:
                self.slow -= 1
                time.sleep(SLOW_S)
            return wait(tickets)

        def faulty_decode(requests: Any) -> Any:
            logits_BV = decode(requests)
            if self.spoil.is_set() and len(requests) == 2:
                self.spoil.clear()
                logits_BV = logits_BV.clone()
                logits_BV[1, 5] = float("nan")
            return logits_BV

        copies.wait, passes.decode = faulty_wait, faulty_decode
        self.engine = model._runtime.engine
        return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(cache: Path) -> str:
    """What the library makes of the prompt."""
    with MoEModel.from_pretrained("bard", expert_slots="25%", policy="lru", cache_dir=cache) as model:
        return model.generate(PROMPT, max_tokens=TOKENS, temperature=0.0, ignore_eos=True).text


@pytest.fixture
def bard(cache: Path, alone: str) -> Iterator[tuple[Serving, Faults]]:
    """Whatever happens, the process then serves what it served before, and nothing outlives its request."""
    faults = Faults()

    def load() -> AsyncEngine:
        model = MoEModel.from_pretrained("bard", expert_slots="25%", policy="lru", cache_dir=cache)
        return AsyncEngine(faults.into(model))

    with serving(load, ping_s=PING_S) as server:
        wait_ready(server)
        yield server, faults
        assert server.http.get("/health").status_code == 200
        assert server.complete(**ASKED).json()["choices"][0]["text"] == alone
        faults.engine.check_integrity()
        assert faults.engine.idle


def streamed(server: Serving, when: Callable[[int], None] = lambda number: None, **more: Any) -> list[str]:
    """All lines of a stream that are not empty; ``when`` hears each event's number as it comes."""
    lines: list[str] = []
    with server.http.stream("POST", "/v1/completions", json=ASKED | {"stream": True} | more) as answer:
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            when(sum(each.startswith("data:") for each in lines))
    return lines


def events(lines: list[str]) -> list[dict[str, Any]]:
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line.startswith("data: ")]


def text(found: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in found for choice in event.get("choices", ()))


def test_a_read_that_fails_in_mid_stream_is_an_error_event(bard: tuple[Serving, Faults], alone: str) -> None:
    server, faults = bard

    def fail(number: int) -> None:
        if number == 2:
            faults.failing = 1

    found = events(streamed(server, fail, max_tokens=400))
    assert "the disk does not answer" in found[-1]["error"]["message"]
    assert text(found).startswith(alone[:3])  # what came before stays


def test_a_disk_that_always_fails_is_a_500_each_time_until_it_works_again(bard: tuple[Serving, Faults]) -> None:
    server, faults = bard
    faults.failing = 1 << 30
    for _ in range(3):
        answer = server.complete(**ASKED)
        assert answer.status_code == 500 and "the disk does not answer" in answer.json()["error"]["message"]
    assert server.http.get("/health").status_code == 200
    faults.failing = 0


def test_a_slow_disk_is_filled_with_pings_and_changes_no_text(bard: tuple[Serving, Faults], alone: str) -> None:
    server, faults = bard
    faults.slow = 3
    lines = streamed(server)
    assert text(events(lines)) == alone
    assert sum(line.startswith(":") for line in lines) >= 3


def test_logits_that_are_no_numbers_end_their_request_alone(bard: tuple[Serving, Faults], alone: str) -> None:
    server, faults = bard
    faults.spoil.set()
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: server.complete(**ASKED | {"max_tokens": 60}), range(2)))
    assert not faults.spoil.is_set()  # they ran side by side
    good, bad = sorted(both, key=lambda answer: answer.status_code)
    assert (good.status_code, bad.status_code) == (200, 500)
    assert "non-finite logits" in bad.json()["error"]["message"]
    assert good.json()["choices"][0]["text"].startswith(alone)


def test_a_chat_template_that_cannot_be_run_is_the_servers_fault(
    served: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate("What ho! {{ messages[0].content }}", {})
    server = served(model=FakeModel(chat_template=template))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        answer = server.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "failed")
    assert server.chat().status_code == 200
    template.close()
