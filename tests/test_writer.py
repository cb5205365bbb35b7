"""Why a request has ended, where its tokens and its text each have a reason."""

from __future__ import annotations

import pytest

from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.text import Text
from duoserve.writer import Writer
from tests.small_tokenizers import llama_tokenizer

TEXT = Text(llama_tokenizer())


def written(tokens: str, reason: str | None, *stop: str) -> tuple[str | None, str | None]:
    """The text of ``tokens``, with the last of which the engine ends the request, and why it has ended then."""
    request, writer = Request([], SamplingParams()), Writer(TEXT, stop)
    ids = [TEXT._tokenizer.token_to_id(token) for token in tokens.split()]
    for place, token in enumerate(ids, 1):
        if place == len(ids) and reason is not None:
            request.finish(reason)
        writer.push(request, token)
    return writer.finish(request), request.finish_reason


def test_a_stop_string_ends_a_text_before_its_length_does() -> None:
    assert written("▁the ▁cat s", None) == ("the cats", None)
    assert written("▁the ▁cat s", None, "at") == ("the c", "stop")
    assert written("▁the ▁cat s", "length") == ("the cats", "length")
    assert written("▁the ▁cat s", "length", "ts") == ("the ca", "stop")
    assert written("▁the <0xFF>", "length", "e\ufffd") == ("th", "stop")  # a character that the end makes certain


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_it_is_not_why_a_request_was_given_up_or_failed(reason: str) -> None:
    assert written("▁the ▁cat s", reason, "ts") == ("the ca", reason)


def test_an_end_token_leaves_no_text_and_brings_out_what_was_held_back() -> None:
    assert written("▁the ▁cat s", "stop") == ("the cat", "stop")
    assert written("▁the ▁cat s", "stop", "t!") == ("the cat", "stop")
    assert written("▁the <0xE6> s", "stop") == ("the\ufffd", "stop")
    assert written("▁the ▁cat s", "stop", "ts") == ("the cat", "stop")
