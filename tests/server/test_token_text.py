"""Single tokens in an answer, where a space belongs to the word behind it and a character to several tokens."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models

from duoserve.errors import DuoServeError
from duoserve.interface import Piece, TokenLogprobs
from duoserve.server.answers import Completions
from duoserve.server.token_text import TokenText
from duoserve.text.tokenizer import IncrementalDecoder, Tokenizer
from tests.helpers.small_tokenizers import byte_level_tokenizer, llama_tokenizer, stripping_tokenizer

LLAMA = llama_tokenizer()
WORDS = ["▁the", "the", "▁", "cat", "##s", ".", "▁é"]


def ids_of(tokens: list[str]) -> list[int]:
    return [LLAMA.token_to_id(token) for token in tokens]


def answered(tokens: list[str], tops: list[list[str]], prompt: tuple[str, ...] = ("<s>",)) -> tuple[str, dict]:
    """The text of a completion, and the log-probabilities beside it; each of ``tops`` is a place's likeliest tokens."""
    ids, prompt_ids, tokenizer = ids_of(tokens), ids_of([*prompt]), Tokenizer(LLAMA)
    decoder = IncrementalDecoder(tokenizer, prompt_ids)
    said = [
        TokenLogprobs(token, -1.0, tuple((LLAMA.token_to_id(name), -1.0 - n) for n, name in enumerate(top)))
        for token, top in zip(ids, tops, strict=True)
    ]
    writer = Completions().writer(0, TokenText(tokenizer), prompt_ids)
    deltas = [writer.deltas(Piece("", (one.token_id,), (one,), None))[-1]["logprobs"] for one in said]
    return "".join(map(decoder.push, ids)) + decoder.flush(), {
        name: [one for delta in deltas for one in delta[name]] for name in deltas[0]
    }


def test_a_token_keeps_the_space_before_its_word() -> None:
    tokens = TokenText(Tokenizer(LLAMA))
    ids = ids_of(["▁the", "the", "▁", "<0xE6>", "</s>"])
    assert [tokens.data(token) for token in ids] == [b" the", b"the", b" ", b"\xe6", b""]
    assert [tokens.label(token) for token in ids] == [" the", "the", " ", "bytes:\\xe6", "token_id:2"]


@pytest.mark.parametrize("decoder", [LLAMA.decoder, decoders.Metaspace(), decoders.WordPiece(cleanup=True), None])
def test_the_bytes_of_tokens_are_those_of_their_text(decoder: decoders.Decoder | None) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="the"))
    if decoder is not None:
        tokenizer.decoder = decoder
    ids = [*range(len(WORDS)), *range(len(WORDS))[::2]]
    whole = tokenizer.decode([3, *ids]).removeprefix("cat")
    assert b"".join(map(TokenText(Tokenizer(tokenizer)).data, ids)).decode() == whole


def test_of_tokens_that_look_alike_the_likelier_counts() -> None:
    _, found = answered(["t", "▁the"], [["t", "<0x74>", "s"], ["▁the", "the"]])
    assert found["top_logprobs"] == [{"t": -1.0, "s": -3.0}, {" the": -1.0, "the": -2.0}]
    assert list(found["top_logprobs"][0]) == ["t", "s"]


def test_the_sampled_token_is_among_the_top_ones_though_others_are_likelier() -> None:
    _, found = answered(["s", "▁cat", "th"], [["t"], [], ["th", "s"]])
    assert found["top_logprobs"] == [{"t": -1.0, "s": -1.0}, {" cat": -1.0}, {"th": -1.0, "s": -2.0}]


def test_offsets_are_places_in_the_text() -> None:
    tokens = ["▁the", "<s>", "▁cat", "<0xC3>", "<0xA9>", "s", "▁the"]
    text, found = answered(tokens, [[]] * len(tokens))
    assert text == "the caté" + "s the"
    assert found["text_offset"] == [0, 3, 3, 7, 7, 8, 9]
    assert text[9:] == " the" == found["tokens"][-1]


@pytest.mark.parametrize("prompt", [("<s>", "▁cat"), ("▁cat", "</s>"), ("<0xC3>", "<0xA9>"), ("▁",)])
def test_behind_a_prompt_the_tokens_are_the_text(prompt: tuple[str, ...]) -> None:
    text, found = answered(["▁the", "▁cat"], [[], []], prompt)
    assert text == " the cat" == "".join(found["tokens"])
    assert found["text_offset"] == [0, 4]


def test_without_a_tokenizer_there_is_no_text_to_have_a_place_in() -> None:
    writer = Completions().writer(0, TokenText(None), [5])
    found = writer.whole([Piece("", (token,), (TokenLogprobs(token, -1.0, ()),), "stop") for token in (5, 6)])
    assert (found["logprobs"]["tokens"], found["logprobs"]["text_offset"]) == (["token_id:5", "token_id:6"], [0, 0])


def test_a_token_that_makes_the_decoder_panic_is_an_error() -> None:
    tokens = TokenText(Tokenizer(stripping_tokenizer(2, 4)))
    with pytest.raises(DuoServeError, match="the tokenizer cannot decode"):
        tokens.label(2)
    assert tokens.label(3) == "w3"


def test_byte_level_tokens_are_their_bytes() -> None:
    tokenizer = byte_level_tokenizer()
    tokens = TokenText(Tokenizer(tokenizer))
    ids = tokenizer.encode("the cat é", add_special_tokens=False).ids
    assert b"".join(map(tokens.data, ids)) == "the cat é".encode()
