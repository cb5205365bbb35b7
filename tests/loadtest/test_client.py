"""What the client makes of answers, byte by byte: server-sent events in every form that the standard allows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from duoserve.loadtest.client import Target, answers
from duoserve.loadtest.events import event_data
from duoserve.loadtest.figures import Answer
from duoserve.loadtest.workload import LoadRequest
from tests.helpers.loops import in_a_loop


@in_a_loop
async def answer(*parts: bytes, timeout_s: float = 5.0, pause_s: float = 0.0, chat: bool = False) -> Answer:
    """What becomes of a request that is answered with ``parts``."""

    async def content() -> AsyncIterator[bytes]:
        for part in parts:
            await asyncio.sleep(pause_s)
            yield part

    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content()))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        target = Target("http://server", "m", timeout_s=timeout_s, chat=chat)
        [found] = await answers(client, target, [LoadRequest("a", 4)], [0.0])
        return found


def event(text: str, **fields: object) -> bytes:
    """A chunk of a completion; of its text nothing is escaped that need not be."""
    chunk = {"choices": [{"text": text}], **fields}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def chat_event(**delta: object) -> bytes:
    """A chunk of a chat."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n".encode()


def usage(tokens: int) -> bytes:
    return f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n".encode()


DONE = b"data: [DONE]\n\n"
ROLE = chat_event(role="assistant", content="")
TOKENS_WITHOUT_TEXT = {
    "of another channel": chat_event(content=""),
    "thoughts": chat_event(reasoning="hm"),
    "thoughts in the older spelling": chat_event(role=None, content=None, reasoning_content="hm"),
}


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
    assert (found.error, len(found.pieces_s), found.tokens) == ("", 3, 5)


def test_tokens_without_text_count_as_the_server_counts_them() -> None:
    """An end token, part of a character, what is held back for a stop string."""
    found = answer(event("a"), event("b"), event(""), usage(3), DONE)
    assert (found.error, len(found.pieces_s), found.tokens) == ("", 3, 3)
    late = answer(event(""), event("a"), usage(2), DONE, pause_s=0.05)
    assert len(late.pieces_s) == 2 and late.tpot_s > 0.02
    assert answer(event(""), usage(1), DONE).error == ""


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
    found = answer(*[b": ping\n\n"] * 1000, event("late"), timeout_s=0.3, pause_s=0.05)
    assert found.error == "not answered to its end within 0.3 s" and found.asked_s == 0.0
    assert time.monotonic() - began < 20.0  # the pings go on for 50 s


@pytest.mark.parametrize("thought", TOKENS_WITHOUT_TEXT.values(), ids=TOKENS_WITHOUT_TEXT)
def test_thoughts_are_tokens_of_a_chat(thought: bytes) -> None:
    """Those that come without text, too: the server counts them."""
    found = answer(ROLE, *[thought] * 10, *[chat_event(content="a")] * 5, usage(15), DONE, pause_s=0.02, chat=True)
    assert (found.error, len(found.pieces_s), found.tokens) == ("", 15, 15)
    assert found.ttft_s >= 0.04 and 0.018 < found.tpot_s < 0.2
    cut = answer(ROLE, *[thought] * 10, usage(10), DONE, chat=True)
    assert (cut.error, len(cut.pieces_s), cut.tokens) == ("", 10, 10)


def test_a_chat_of_which_no_token_comes_has_failed() -> None:
    """Not even where it is said whose turn it is, why it has ended, and that nothing was counted."""
    assert answer(ROLE, chat_event(), usage(0), DONE, chat=True).error == "no token came"


def test_a_first_chunk_may_bring_a_token_with_its_role() -> None:
    first = chat_event(role="assistant", content="a")
    assert len(answer(first, chat_event(content="b"), usage(2), DONE, chat=True).pieces_s) == 2
