"""The soak: what it asks for, what it would notice, and all of it on `bard` with few requests."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from soak import report as soak_report
from soak.clients import Clients, soak
from soak.load import CANCELLED, MALFORMED, WRONG, Asked, Kind, kinds, requests
from soak.watch import Sample, growth, look, looking
from tests.bench.conftest import Ran
from tests.helpers.loops import in_a_loop

KIND = Kind("a", 2, 0.0, 0, (), 1)
EVENTS = [{"choices": [{"index": 0, "text": "x", "finish_reason": None}]}]
EVENTS += [{"choices": [{"index": 0, "text": "y", "finish_reason": "length"}]}]
EVENTS += [{"choices": [], "usage": {"completion_tokens": 2}}]
WHOLE = {"choices": [{"index": 0, "text": "xy", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}


def stream(events: list[dict[str, Any]], end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {json.dumps(one)}\n\n" for one in events) + end


@in_a_loop
async def served(fate: str, answer: httpx.Response, expected: tuple[str, str] = ("xy", "length")) -> Any:
    """The tally of one client that gets ``answer``."""
    transport = httpx.MockTransport(lambda request: answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        clients = Clients(http, [KIND], [[expected]], 0)
        await soak(clients, [Asked(fate, 0, {}, 0)], 1)
        return clients.tally


def test_a_good_answer_is_no_fault() -> None:
    for fate, answer in (
        ("whole", httpx.Response(200, json=WHOLE)),
        ("streamed", httpx.Response(200, text=stream(EVENTS))),
    ):
        tally = served(fate, answer)
        assert (tally.faults, tally.choices, tally.tokens, tally.ended[fate]) == ([], 1, 2, 1)


@pytest.mark.parametrize(
    ("fate", "answer", "says"),
    [
        ("whole", httpx.Response(500, text="broken"), "500: broken"),
        ("whole", httpx.Response(429, text="full"), "429"),
        ("whole", httpx.Response(200, text="{"), "JSONDecodeError"),
        ("whole", httpx.Response(200, json=WHOLE | {"choices": []}), "but alone"),
        ("streamed", httpx.Response(503, text="gone"), "503: gone"),
        ("streamed", httpx.Response(200, text=stream(EVENTS, end="")), "a stream ended with"),
        ("streamed", httpx.Response(200, text=stream(EVENTS[:1])), "'none'"),
        ("streamed", httpx.Response(200, text=stream([*EVENTS[:1], {"error": {"message": "disk"}}])), "in a stream"),
        ("malformed", httpx.Response(200, json={}), "200, not"),
        ("malformed", httpx.Response(500, json={}), "500, not"),
    ],
)
def test_what_must_not_be_is_a_fault(fate: str, answer: httpx.Response, says: str) -> None:
    tally = served(fate, answer)
    assert tally.num_faults >= 1 and says in " ".join(tally.faults)


def test_another_text_is_a_fault() -> None:
    assert served("whole", httpx.Response(200, json=WHOLE), ("xz", "length")).num_faults == 1
    assert served("streamed", httpx.Response(200, text=stream(EVENTS)), ("xy", "stop")).num_faults == 1


def test_requests_are_of_every_kind_and_the_same_for_a_seed() -> None:
    asked = requests(10_000, 300, 0)
    assert asked == requests(10_000, 300, 0) != requests(10_000, 300, 1)
    shares = {fate: number / 10_000 for fate, number in Counter(one.fate for one in asked).items()}
    assert shares["cancelled"] == pytest.approx(CANCELLED, rel=0.2)
    assert shares["malformed"] == pytest.approx(MALFORMED, rel=0.3)
    found = kinds("to be or not to be " * 100, 300, 0)
    assert {kind.n for kind in found} == {1, 3} and {bool(kind.stop) for kind in found} == {False, True}
    assert sum(kind.temperature == 0 for kind in found) > 200 and len({kind.prompt for kind in found}) > 200
    assert len(WRONG) > 50 and all(400 <= one.says < 500 for one in WRONG)


def samples(leak: int, files: int = 0) -> list[Sample]:
    """Of 10,000 requests, each of which leaves ``leak`` bytes behind the thousand that warm up."""
    return [Sample(n, 1 << 28, (1 << 27) + leak * max(0, n - 1000), 9, 20 + n * files) for n in range(0, 10_001, 100)]


@in_a_loop
async def test_however_fast_requests_are_each_quarter_is_looked_at() -> None:
    found = [look(os.getpid(), 0)]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=WHOLE))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        clients = Clients(http, [KIND], [[("xy", "length")]], 0)
        clients.one_has_ended = looking(os.getpid(), 200, clients.tally.ended.total, found)
        await soak(clients, [Asked("whole", 0, {}, 0)] * 200, 64)
    assert [one.requests for one in found] == [*range(0, 201, 10)]
    assert growth(found)["grown_bytes"] is not None


def test_a_server_that_nobody_looked_at_once_it_was_warm_is_not_said_to_be_flat() -> None:
    few = [one for one in samples(0) if not 2500 <= one.requests < 5000]
    assert failed(memory=growth(few)) == ["memory is flat", "files and threads too"]
    assert "not measured: nobody looked" in soak_report.checks(result(memory=growth(few)))[6]["detail"]


def result(**changes: Any) -> dict[str, Any]:
    """One in which all is well, but for ``changes``."""
    tally = {"num_faults": 0, "choices": 90, "ended": {"whole": 95, "cancelled": 5}, "faults": []}
    service = {"refused": 0, "finished": {"stop": 90, "abort": 5}, "running": 0, "waiting": 0, "kv_usage": 0.0}
    end = {"integrity": "nothing is left", "exit_code": 0, "stderr": ""}
    found = {"tally": tally, "service": service | {"health": 200}, "memory": growth(samples(0)), "end": end}
    return {"asked": 100} | {name: part | changes.get(name, {}) for name, part in found.items()}


def failed(**changes: Any) -> list[str]:
    return [check["name"] for check in soak_report.checks(result(**changes)) if not check["passed"]]


def test_every_check_can_fail() -> None:
    assert failed() == []
    assert failed(tally={"num_faults": 1}) == ["every request ended as it should", "texts are those made alone"]
    assert failed(tally={"ended": {"whole": 99}}) == ["every request ended as it should"]
    assert failed(service={"refused": 1}) == ["nothing failed or was refused"]
    assert failed(service={"finished": {"stop": 90, "error": 1}}) == ["nothing failed or was refused"]
    assert failed(service={"finished": {"stop": 89}}) == ["what was served was finished"]
    assert failed(service={"kv_usage": 0.1}) == ["nothing runs, waits or has pages"]
    assert failed(end={"integrity": "pages 1"}) == ["check_integrity()"]
    assert failed(memory=growth(samples(4000))) == ["memory is flat"]
    assert failed(memory=growth(samples(0, files=1))) == ["files and threads too"]
    assert failed(service={"health": 503}) == ["healthy to the end"]
    assert failed(end={"stderr": "Traceback"}) == failed(end={"exit_code": 1}) == ["SIGTERM ends it"]


def test_the_command(bench_result: Callable[..., Ran]) -> None:
    found = bench_result("bench_soak", "--quick", "--requests", "200").result
    assert sum(found["tally"]["ended"].values()) == 200 and found["tally"]["choices"] > 160
    assert all(check["passed"] for check in found["checks"])
    assert found["service"]["finished"]["abort"] > 0 and "**FAILED**" not in soak_report.render(found)
