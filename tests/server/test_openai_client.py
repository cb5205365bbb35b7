"""The ``openai`` package as it comes, against the server."""

from __future__ import annotations

import openai
import pytest

from duoserve.errors import CopyError, OverloadedError
from tests.server.conftest import NAME
from tests.server.fake_service import script_of, spoken, with_logprobs

USER = [{"role": "user", "content": "hi"}]


def client(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=10)


def test_models_completions_and_chats(served):
    server = served(script_of(with_logprobs("Hello", 65), with_logprobs(" you", 66, "stop")))
    ours = client(server)
    assert [one.id for one in ours.models.list()] == [NAME]
    done = ours.completions.create(model=NAME, prompt="the cat", max_tokens=4, logprobs=2)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("Hello you", "stop")
    assert done.choices[0].logprobs.token_logprobs == [-0.25, -0.25]
    chat = ours.chat.completions.create(model=NAME, messages=USER, logprobs=True, top_logprobs=2, n=2)
    assert [one.message.content for one in chat.choices] == ["Hello you", "Hello you"]
    assert chat.choices[1].logprobs.content[0].top_logprobs[0].logprob == -0.25
    assert chat.usage.completion_tokens == 4


def test_streams_with_usage_through_pings(served):
    server = served(script_of(0.2, *spoken("a", "b", "c")), ping_s=0.05)
    stream = client(server).chat.completions.create(
        model=NAME, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(one.choices[0].delta.content for one in chunks[:-1]) == "abc"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    texts = [one.choices[0].text for one in client(server).completions.create(model=NAME, prompt="x", stream=True)]
    assert texts == ["a", "b", "c"]


def test_errors_have_their_types(served):
    refusals = iter([OverloadedError("full", 1.0), CopyError("gone")])

    def script(number):
        raise next(refusals)

    ours = client(served(script, api_key="s3cret"), "s3cret")
    with pytest.raises(openai.BadRequestError) as bad:
        ours.completions.create(model=NAME, prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        ours.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.RateLimitError):
        ours.completions.create(model=NAME, prompt="x")
    with pytest.raises(openai.InternalServerError):
        ours.completions.create(model=NAME, prompt="x")
    with pytest.raises(openai.AuthenticationError):
        ours.with_options(api_key="wrong").models.list()


def test_an_error_in_mid_stream_is_raised(served):
    server = served(script_of(spoken("a", "b")[0], CopyError("expert (1, 2) could not be read")))
    stream = client(server).completions.create(model=NAME, prompt="x", stream=True)
    assert next(stream).choices[0].text == "a"
    with pytest.raises(openai.APIError, match="could not be read"):
        list(stream)
