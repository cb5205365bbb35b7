"""What of an answer in channels is said: as OpenAI's harmony format has it, for tokenizers that know its marks."""

from __future__ import annotations

import pytest

from duoserve.text.channels import Channels, said
from duoserve.text.tokenizer import Tokenizer
from tests.helpers.small_tokenizers import byte_level_tokenizer, channel_tokenizer

THOUGHT = "<|channel|>analysis<|message|>The cat?<|end|><|start|>assistant"
ANSWERS = {
    "thoughts": (f"{THOUGHT}<|channel|>final<|message|>the café<|return|>", "the café"),
    "a constraint": (f"{THOUGHT}<|channel|>final json<|message|>7<|return|>", "7"),
    "no thoughts": ("<|channel|>final<|message|>the mat", "the mat"),
    "two answers": ("<|channel|>final<|message|>a<|end|><|channel|>final<|message|>b<|return|>", "b"),
    "cut in thoughts": ("<|channel|>analysis<|message|>The final", ""),
    "cut in a name": (f"{THOUGHT}<|channel|>fin", ""),
    "cut before another": ("<|channel|>final<|message|>a<|end|>", "a"),
    "another channel behind": ("<|channel|>final<|message|>a<|end|><|channel|>commentary<|message|>b", ""),
    "no channels": ("the final<|message|> mat<|end|>", "the final mat"),
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_what_is_said_is_in_the_final_channel(answer: str, expected: str) -> None:
    tokenizer = Tokenizer(channel_tokenizer())
    token_ids = tokenizer.encode(answer)
    assert said(tokenizer, tokenizer.decode(token_ids), token_ids) == expected


def test_text_that_a_stop_string_cut_stays_cut() -> None:
    tokenizer = Tokenizer(channel_tokenizer())
    token_ids = tokenizer.encode(f"{THOUGHT}<|channel|>final<|message|>the mat")
    assert said(tokenizer, tokenizer.decode(token_ids).removesuffix(" mat"), token_ids) == "the"


def test_tokens_are_told_apart_as_they_come() -> None:
    tokenizer = Tokenizer(channel_tokenizer())
    token_ids = tokenizer.encode(ANSWERS["thoughts"][0])
    channels = Channels(tokenizer)
    assert tokenizer.decode([token_id for token_id in token_ids if channels.push([token_id])]) == "the café"


SAID = {
    "a further answer": (f"<|channel|>final<|message|>a<|end|>{THOUGHT}<|channel|>final<|message|>b<|return|>", "ab"),
    "a header's start": ("<|channel|>final<|message|>a<|end|><|start|>assistant", "a"),
    "no end": ("<|channel|>final<|message|>a<|start|>assistant<|channel|>commentary<|message|>b", "a"),
    "a message in no channel": ("<|channel|>final<|message|>a<|end|><|start|>assistant<|message|>b<|end|>", "a"),
    "no channels": ("a<|end|><|start|>assistant<|message|>b", "aassistantb"),
}


@pytest.mark.parametrize(("answer", "expected"), SAID.values(), ids=SAID)
def test_no_header_of_a_further_message_is_said(answer: str, expected: str) -> None:
    tokenizer = Tokenizer(channel_tokenizer())
    channels = Channels(tokenizer)
    told = [token_id for token_id in tokenizer.encode(answer) if channels.push([token_id])]
    assert tokenizer.decode(told) == expected


def test_without_the_marks_all_is_said() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer())
    token_ids = tokenizer.encode(ANSWERS["thoughts"][0])
    assert said(tokenizer, tokenizer.decode(token_ids), token_ids) == ANSWERS["thoughts"][0]
