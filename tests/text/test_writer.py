"""Why a request has ended, where its tokens and its text each have a reason."""

from __future__ import annotations

import pytest

from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.text.tokenizer import Tokenizer
from duoserve.text.writer import Writer
from tests.helpers.small_tokenizers import channel_tokenizer, llama_tokenizer

TOKENIZER = Tokenizer(llama_tokenizer())
CHANNELS = Tokenizer(channel_tokenizer())
THOUGHT, FINAL = "<|channel|>analysis<|message|>ok<|end|><|start|>assistant", "<|channel|>final<|message|>"


def written(tokens: str, reason: str | None, *stop: str) -> tuple[str | None, str | None]:
    """The text of ``tokens``, with the last of which the engine ends the request, and why it has ended then."""
    request, writer = Request([], SamplingParams()), Writer(TOKENIZER, stop)
    ids = [TOKENIZER._tokenizer.token_to_id(token) for token in tokens.split()]
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


@pytest.mark.parametrize(
    ("answer", "stop", "text", "reason"),
    [
        (f"{THOUGHT}{FINAL}the mat", "let", "analysisokassistantfinalthe mat", None),
        (f"{THOUGHT}{FINAL}the mat", "lthe", "analysisokassistantfinalthe mat", None),
        (f"{THOUGHT}{FINAL}the mat", "final", "analysisokassistantfinalthe mat", None),
        (f"{THOUGHT}{FINAL}the mat", "okassistant", "analysisokassistantfinalthe mat", None),
        (f"{THOUGHT}{FINAL}the mat", "okthe", "analysisokassistantfinalthe mat", None),
        (f"{THOUGHT}{FINAL}the mat", "e m", "analysisokassistantfinalth", "stop"),
        (f"{THOUGHT}{FINAL}the mat", "ok", "analysis", "stop"),
        (f"{FINAL}the mat<|end|>{THOUGHT}", "at!", "finalthe matanalysisokassistant", None),
        (f"{FINAL}the mat<|end|><|start|>assistant", "assist", "finalthe matassistant", None),
        ("the mat<|start|>assistant", "assist", "the mat", "stop"),  # an answer without channels has no headers
    ],
)
def test_stop_strings_do_not_see_the_headers_of_channels(answer: str, stop: str, text: str, reason: str | None) -> None:
    request, writer = Request([], SamplingParams()), Writer(CHANNELS, [stop])
    pieces = [writer.push(request, token) for token in CHANNELS.encode(answer)]
    assert ("".join([*pieces, writer.rest(request)]), request.finish_reason) == (text, reason)


def test_what_was_held_back_comes_before_a_header() -> None:
    request, writer = Request([], SamplingParams()), Writer(CHANNELS, ["at!"])
    pieces = [writer.push(request, token) for token in CHANNELS.encode(f"{FINAL}the mat<|end|>")]
    assert "".join(pieces) == "finalthe mat"
