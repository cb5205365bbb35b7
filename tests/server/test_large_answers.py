"""An answer of very many log-probabilities holds nobody else up."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from duoserve.interface import Piece, TokenLogprobs
from duoserve.server.http import json_in_parts
from tests.server.fake_service import FakeModel, script_of

CHOICES, TOKENS, TOPS = 4, 4000, 20


def chatty(tokens=TOKENS):
    """A choice that comes in one piece, of so many tokens with the likeliest ones at each place."""
    tops = tuple((65 + n, -0.5 - n) for n in range(TOPS))
    return Piece("x" * tokens, (65,) * tokens, (TokenLogprobs(65, -0.5, tops),) * tokens, "length")


@pytest.mark.parametrize("chat", [False, True])
def test_others_are_answered_while_a_large_answer_is_made(served, chat):
    server = served(script_of(chatty()), model=FakeModel(max_context=2 * TOKENS))
    ask, wanted = (
        (server.chat, {"logprobs": True, "top_logprobs": TOPS}) if chat else (server.complete, {"logprobs": TOPS})
    )

    def answered():
        """When it was asked for, and when the first of it came."""
        began = time.monotonic()
        found = ask(n=CHOICES, max_tokens=TOKENS, **wanted)
        return began, began + found.elapsed.total_seconds(), found

    others = []
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(answered)
        while not answer.done():
            asked = time.monotonic()
            assert server.http.get("/health").status_code == 200
            others.append((asked, time.monotonic()))
    began, came, found = answer.result()
    assert len(found.json()["choices"]) == CHOICES
    meanwhile = [(asked, told) for asked, told in others if began < asked and told < came]
    assert len(meanwhile) >= 5  # an event loop that made the answer itself would tell one or two, before it begins


def test_others_are_answered_while_the_ids_of_a_long_text_are_written(served):
    tokenizer = SimpleNamespace(encode=lambda prompt: [12_345] * 4_000_000)
    server = served(model=FakeModel(tokenizer=tokenizer))
    came = []

    def answered():
        with server.http.stream("POST", "/tokenize", json={"prompt": "long"}) as found:
            came.append(time.monotonic())
            found.read()
        return found

    told = []
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(answered)
        while not answer.done():
            assert server.http.get("/health").status_code == 200
            told.append(time.monotonic())
    assert len(answer.result().json()["tokens"]) == 4_000_000
    assert sum(one < came[0] for one in told) >= 5


def test_json_in_parts_is_json():
    value = {"é": [{"a": {"b": [{"c": [1, {"d": None}]}, 2.5, "\ud800"]}}, [], {}], "e": True, "f": {"g": "\n"}}
    for depth in range(9):
        assert json_in_parts(value, depth) == json.dumps(value)
    assert json_in_parts({"a": iter([1, {"b": 2}])}) == '{"a": [1, {"b": 2}]}'
