"""What the client makes of answers, byte by byte: server-sent events in every form that the standard allows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from duoserve.loadtest.client import Form, answers
from duoserve.loadtest.events import event_data
from duoserve.loadtest.figures import Answer
from duoserve.loadtest.workload import LoadRequest


def answer(*parts: bytes, timeout_s: float = 5.0, pause_s: float = 0.0) -> Answer:
    """What becomes of a request that is answered with ``parts``."""

    async def content() -> AsyncIterator[bytes]:
        for part in parts:
            await asyncio.sleep(pause_s)
            yield part

    async def main() -> Answer:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            [found] = await answers(client, Form("m", timeout_s=timeout_s), [LoadRequest("a", 4)], [0.0])
            return found

    return asyncio.run(main())


def event(text: str, **fields: object) -> bytes:
    """A chunk of a completion; of its text nothing is escaped that need not be."""
    chunk = {"choices": [{"text": text}], **fields}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def crlf(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r\n")


def cr(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r")


def without_spaces(data: bytes) -> bytes:
    return data.replace(b"data: ", b"data:")


def with_more(data: bytes) -> bytes:
    return b"\xef\xbb\xbf" + data.replace(b"data: ", b": ping\n\nevent: x\nid: 5\nretry\ndata: ")


def over_lines(data: bytes) -> bytes:
    return data.replace(b'[{"text"', b'[\ndata: {"text"')


@pytest.mark.parametrize("form", [bytes, crlf, cr, without_spaces, with_more, over_lines])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_read_in_every_form(form: Callable[[bytes], bytes], size: int) -> None:
    data = form(event("a") + event("é") + event("", usage={"completion_tokens": 5}) + DONE)
    found = answer(*(data[begin : begin + size] for begin in range(0, len(data), size)))
    assert (found.error, len(found.pieces_s), found.tokens) == ("", 2, 5)


def test_only_cr_and_lf_end_lines() -> None:
    found = answer(*(event(f"a{char}b") for char in "\u2028\u2029\x85\x0b\x0c\x1c"), DONE)
    assert (found.error, len(found.pieces_s)) == ("", 6)


def test_an_event_is_told_of_before_more_has_come() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"data: a\n\n"
        raise AssertionError("asked for more")

    assert asyncio.run(anext(event_data(endless()))) == "a"


@pytest.mark.parametrize("odd", [{"choices": None}, {"error": None}, {"usage": None}, {"usage": {}}, {"choices": []}])
def test_null_is_nothing(odd: dict[str, object]) -> None:
    found = answer(event("a"), f"data: {json.dumps(odd)}\n\n".encode(), event("b", error=None), DONE)
    assert (found.error, len(found.pieces_s)) == ("", 2)


@pytest.mark.parametrize("odd", ["[]", "5", "null", '"x"', '{"choices": 5}', '{"choices": [5]}', '{"usage": 5}', "{"])
def test_what_is_not_openais_is_a_failure_of_that_request(odd: str) -> None:
    found = answer(event("a"), f"data: {odd}\n\n".encode(), DONE)
    assert found.error.startswith(("ValueError: an event is not OpenAI's: ", "JSONDecodeError: ")), found.error


def test_an_error_that_the_server_tells_of_is_the_requests() -> None:
    assert "the disk failed" in answer(event("a"), b'data: {"error": {"message": "the disk failed"}}\n\n', DONE).error


def test_a_request_that_is_kept_up_with_pings_ends_all_the_same() -> None:
    began = time.monotonic()
    found = answer(*[b": ping\n\n"] * 100, event("late"), timeout_s=0.3, pause_s=0.05)
    assert found.error == "not answered to its end within 0.3 s" and found.asked_s == 0.0
    assert time.monotonic() - began < 2.0
