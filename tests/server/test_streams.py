"""Streamed answers: the order of events, pings, errors once the status has been sent, and clients that go away."""

from __future__ import annotations

import json
import logging
import socket
import time
from dataclasses import replace

import pytest

from duoserve.errors import CopyError, DuoServeError
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.text.tokenizer import IncrementalDecoder, Tokenizer
from duoserve.text.writer import Writer
from tests.helpers.small_tokenizers import channel_tokenizer
from tests.server.fake_service import FakeModel, script_of, spoken, with_logprobs


def lines(server, path="/v1/completions", **fields):
    """Whatever the server sends, line by line, but for the empty ones."""
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": True, **fields}
    with server.http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        return [line for line in answer.iter_lines() if line]


def events(found):
    """The events among ``lines``, of which the last must be the end."""
    assert found[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in found[:-1] if line.startswith("data: ")]


def test_a_completion_streams_pieces_with_one_id(served):
    chunks = events(lines(served(script_of(*spoken("a", "b", "c", finish="length")))))
    assert [one["choices"][0]["text"] for one in chunks] == ["a", "b", "c"]
    assert [one["choices"][0]["finish_reason"] for one in chunks] == [None, None, "length"]
    assert len({(one["id"], one["created"], one["object"]) for one in chunks}) == 1
    assert all("usage" not in one for one in chunks)


def test_a_chat_says_its_role_first_and_its_usage_last(served):
    server = served(script_of(*spoken("a", "b")))
    chunks = events(lines(server, "/v1/chat/completions", stream_options={"include_usage": True}))
    deltas = [one["choices"][0]["delta"] for one in chunks[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2
    assert {one["object"] for one in chunks} == {"chat.completion.chunk"}


def test_the_usage_so_far_may_be_in_every_chunk(served):
    """It is that of the chunk's choice, as in vLLM; the usage at the end is that of all choices."""
    server = served(script_of(*spoken("a", "b")))
    for end in (False, True):
        options = {"continuous_usage_stats": True, "include_usage": end}
        chunks = events(lines(server, n=2, stream_options=options))
        usages = [one["usage"] for one in chunks if one["choices"]]
        assert sorted(one["completion_tokens"] for one in usages) == [1, 1, 2, 2]
        assert all(one["total_tokens"] == one["prompt_tokens"] + one["completion_tokens"] for one in usages)
        assert [one["usage"]["completion_tokens"] for one in chunks if not one["choices"]] == [4] * end
    chunks = events(lines(server, "/v1/chat/completions", stream_options={"continuous_usage_stats": True}))
    assert [one["usage"]["completion_tokens"] for one in chunks] == [0, 1, 2]


def test_a_chat_says_what_is_in_the_final_channel(served):
    """Whole and streamed, with log-probabilities of that alone; a completion gives the text as it is."""
    tokenizer = Tokenizer(channel_tokenizer())
    thought = "<|channel|>analysis<|message|>ok?<|end|><|start|>assistant"
    token_ids = tokenizer.encode(f"{thought}<|channel|>final<|message|>cat")
    decoder = IncrementalDecoder(tokenizer)
    steps = [with_logprobs(decoder.push(token_id), token_id) for token_id in token_ids]
    steps[-1] = replace(steps[-1], finish_reason="stop")
    server = served(script_of(*steps), model=FakeModel(tokenizer=tokenizer))
    done = server.chat(logprobs=True).json()
    assert done["choices"][0]["message"]["content"] == "cat"
    assert "".join(one["token"] for one in done["choices"][0]["logprobs"]["content"]) == "cat"
    assert done["usage"]["completion_tokens"] == len(token_ids)
    chunks = events(lines(server, "/v1/chat/completions"))
    assert "".join(one["choices"][0]["delta"]["content"] for one in chunks) == "cat"
    assert server.complete().json()["choices"][0]["text"] == "analysisok?assistantfinalcat"


@pytest.mark.parametrize("stop", ["let", "lthe", "final", "assistant", "at!", "t\0"])
def test_nothing_of_a_channels_header_is_in_a_chat(served, stop):
    """Nor is it held against a stop string, and what was held back for one is not lost at the end of what is said."""
    tokenizer, final = Tokenizer(channel_tokenizer()), "<|channel|>final<|message|>"
    thought, further = "<|channel|>analysis<|message|>ok?<|end|><|start|>assistant", "<|end|><|start|>assistant"
    token_ids = tokenizer.encode(f"{thought}{final}the mat{further}")
    request, writer = Request([], SamplingParams()), Writer(tokenizer, [stop])
    steps = [with_logprobs(writer.push(request, token_id), token_id) for token_id in token_ids]
    steps[-1] = replace(steps[-1], text=steps[-1].text + writer.rest(request), finish_reason="length")
    server = served(script_of(*steps), model=FakeModel(tokenizer=tokenizer))
    choice = server.chat(logprobs=True).json()["choices"][0]
    assert choice["message"]["content"] == "the mat"
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == "the mat"
    chunks = events(lines(server, "/v1/chat/completions"))
    assert "".join(one["choices"][0]["delta"]["content"] for one in chunks) == "the mat"


def test_choices_stream_side_by_side(served):
    """A piece comes when it is said, whichever choice says it."""
    pause = 0.25

    def script(number):
        first, second = spoken(f"{number}a", f"{number}b")
        return [pause * (5 - 2 * number), first, pause * 3, second]

    chunks = events(lines(served(script), n=3))
    said = [(one["choices"][0]["index"], one["choices"][0]["text"]) for one in chunks]
    assert said == [(2, "2a"), (1, "1a"), (2, "2b"), (0, "0a"), (1, "1b"), (0, "0b")]


def test_streamed_log_probabilities_keep_their_offset(served):
    server = served(script_of(with_logprobs("a", 65), with_logprobs("b", 66, "stop")))
    found = [one["choices"][0]["logprobs"] for one in events(lines(server, logprobs=1))]
    assert [one["text_offset"] for one in found] == [[0], [len(found[0]["tokens"][0])]]


def test_pings_come_while_the_first_token_does_not(served):
    found = lines(served(script_of(1.0, *spoken("late")), ping_s=0.1))
    assert found[:2] == [": ping", ": ping"]
    assert [one["choices"][0]["text"] for one in events(found)] == ["late"]


def test_pings_come_between_slow_tokens_too(served):
    first, last = spoken("a", "b")
    found = lines(served(script_of(first, 1.0, last), ping_s=0.1))
    assert found[0].startswith("data: ") and ": ping" in found


@pytest.mark.parametrize("error", [CopyError("expert (1, 2) could not be read"), DuoServeError("non-finite logits")])
def test_a_failure_before_the_first_token_is_a_500_and_the_next_is_served(served, error):
    server = served(lambda number: [error] if number == 0 else spoken("fine"))
    answer = server.complete(stream=True)
    assert answer.status_code == 500 and str(error) in answer.json()["error"]["message"]
    assert [one["choices"][0]["text"] for one in events(lines(server))] == ["fine"]


def test_a_failure_in_mid_stream_is_an_error_event_and_the_next_is_served(served):
    first = spoken("a", "b")[0]
    error = CopyError("expert (1, 2) could not be read")
    server = served(lambda number: [first, error] if number == 0 else spoken("fine"))
    chunks = events(lines(server))
    assert chunks[0]["choices"][0]["text"] == "a"
    assert chunks[1]["error"] == {"message": str(error), "type": "server_error", "param": None, "code": "failed"}
    assert [one["choices"][0]["text"] for one in events(lines(server))] == ["fine"]


def test_one_failed_choice_ends_the_answer_and_stops_the_others(served):
    server = served(lambda number: [0.1, CopyError("gone")] if number else [60.0, *spoken("never")])
    answer = server.complete(n=2)
    assert answer.status_code == 500
    assert server.service.streams[0].cancelled_at is not None


def leave(server, body, until):
    """Sends a request, reads until ``until`` has come, and closes the connection."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        found = b""
        while until not in found:
            found += connection.recv(4096)
        if not until:
            wait_for(lambda: server.service.streams)


def wait_for(condition):
    """Until it holds; at most 20 seconds, a third of what the scripts pause for."""
    until = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < until, "never happened"
        time.sleep(0.005)


ENDLESS = (spoken("a", "b")[0], 60.0, *spoken("never"))


@pytest.mark.parametrize(
    ("steps", "body", "until"),
    [
        (ENDLESS, {"stream": True}, b'"text":"a"'),
        ((60.0, *spoken("never")), {"stream": True}, b""),
        ((60.0, *spoken("never")), {}, b""),
        (ENDLESS, {"n": 3}, b""),
    ],
    ids=["in mid-stream", "before the first token", "not streamed", "several choices"],
)
def test_work_stops_when_the_client_is_gone(served, steps, body, until):
    server = served(script_of(*steps), ping_s=60.0)  # to send one would tell, too
    leave(server, {"prompt": "a", **body}, until)
    wait_for(lambda: all(stream.cancelled_at is not None for stream in server.service.streams))
    assert len(server.service.streams) == body.get("n", 1)
    assert server.http.get("/status").json()["requests"][0]["state"] == "abort"


def test_a_client_that_leaves_while_pings_are_sent_is_noticed(served):
    server = served(script_of(60.0, *spoken("never")), ping_s=0.05)
    leave(server, {"prompt": "a", "stream": True}, b"ping")
    wait_for(lambda: server.service.streams[0].cancelled_at is not None)


def connected(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_the_server(served, capsys):
    server = served()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(head + b'{"prompt"')
        time.sleep(0.1)  # for the server to begin to read
    assert server.complete().status_code == 200
    server.stop()
    assert capsys.readouterr().err == ""


def test_what_nobody_foresaw_in_mid_stream_is_logged(served, caplog):
    server = served(script_of(spoken("a", "b")[0], ZeroDivisionError("a bug")))
    assert events(lines(server))[-1]["error"]["code"] == "internal"
    assert [one.exc_info[0] for one in caplog.records if one.levelno >= logging.ERROR] == [ZeroDivisionError]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_server_is_a_line_in_its_log_and_a_clients_is_none(served, caplog, stream):
    server = served(script_of(spoken("a", "b")[0], CopyError("expert (1, 2) could not be read")))
    assert "could not be read" in server.complete(stream=stream).text
    assert server.complete(stream=stream, temperature=-1).status_code == 400
    [record] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "could not be read" in record.getMessage() and not record.exc_info
