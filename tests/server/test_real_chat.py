"""Chats with a small real checkpoint, as transformers saves one: what transformers says to the same messages."""

from __future__ import annotations

import openai
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from duoserve.moe_model import MoEModel
from duoserve.service.async_engine import AsyncEngine
from tests.helpers.checkpoints import reference_greedy, save_mixtral
from tests.helpers.small_tokenizers import byte_level_tokenizer
from tests.server.conftest import serving, wait_ready

TEMPLATE = """{{ bos_token }}{% for message in messages %}
<|{{ message.role }}|>{{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TALKS = (
    [{"role": "user", "content": " Who's there? "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who's there?"},
        {"role": "assistant", "content": "Nay, answer me."},
        {"role": "user", "content": "Long live the king! é"},
    ],
)
COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, tokenizer.json, special tokens in tokenizer_config.json, and the template where transformers puts it."""
    found = save_mixtral(tmp_path_factory.mktemp("chat"), vocab_size=291)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token="<s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def load():
        return AsyncEngine(MoEModel.from_pretrained(folder, dtype="float32", expert_slots="50%", cache_dir=cache))

    with serving(load) as server:
        wait_ready(server)
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module", params=TALKS, ids=["one message", "a conversation"])
def talk(request, folder):
    """Messages, the ids of their prompt, and what transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(request.param, add_generation_prompt=True, return_dict=False)
    return request.param, ids, tokenizer.decode(reference_greedy(folder, ids, COUNT, torch.float32))


def ask(client, messages, **fields):
    return client.chat.completions.create(
        model="fake", messages=messages, max_tokens=COUNT, temperature=0, extra_body={"ignore_eos": True}, **fields
    )


def test_the_answer_is_that_of_transformers(client, talk):
    messages, ids, answer = talk
    done = ask(client, messages)
    assert done.choices[0].message.role == "assistant" and done.choices[0].finish_reason == "length"
    assert done.choices[0].message.content == answer
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), COUNT)


def test_a_stream_has_the_same_answer(client, talk):
    messages, _, answer = talk
    chunks = list(ask(client, messages, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert chunks[-1].choices[0].finish_reason == "length"
