"""Requests of any shape find no 500: every endpoint and field that is known, nested ones too, with values of any type.

The last test asks the real engine, which samples and writes what the others only hand over.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duoserve.moe_model import MoEModel
from duoserve.service.async_engine import AsyncEngine
from tests.server.conftest import serving, wait_ready

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=8)
)
ANY = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3))
CONTENT_PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]) | ANY}, optional={"text": ANY})
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "developer", "king"]) | ANY,
        "content": st.text(max_size=6) | st.lists(CONTENT_PART | ANY, max_size=3) | ANY,
    },
    optional={"name": ANY, "tool_calls": ANY},
)
PARTS = {  # what fields with fields of their own may hold
    "stream_options": ["include_usage", "unknown"],
    "response_format": ["type", "json_schema"],
    "logit_bias": ["5", "-1"],
}
NAMES = """
    model max_tokens max_completion_tokens n best_of logprobs top_logprobs stream stream_options temperature top_p
    top_k min_p repetition_penalty stop seed ignore_eos echo suffix logit_bias tools functions response_format user
    presence_penalty frequency_penalty slo_ttft_ms slo_tpot_ms chat_template chat_template_kwargs unknown
    add_generation_prompt add_special_tokens skip_special_tokens length_penalty reasoning_effort documents
"""
PART = st.sampled_from(sorted(PARTS)).flatmap(
    lambda name: st.dictionaries(st.sampled_from(PARTS[name]), ANY | st.just("text"), max_size=2).map(
        lambda part: {name: part}
    )
)
FIELDS = st.builds(
    lambda fields, part: fields | part,
    st.dictionaries(st.sampled_from(NAMES.split()), ANY, max_size=3),
    PART | st.just({}),
)
PROMPT = st.text(max_size=6) | st.lists(st.integers(-1, 300), max_size=4) | ANY
BODIES = (
    st.tuples(
        st.just("/v1/completions"), st.builds(lambda fields, prompt: {**fields, "prompt": prompt}, FIELDS, PROMPT)
    )
    | st.tuples(
        st.just("/v1/chat/completions"),
        st.builds(
            lambda fields, messages: {**fields, "messages": messages}, FIELDS, st.lists(MESSAGE, max_size=3) | ANY
        ),
    )
    | st.tuples(st.just("/tokenize"), st.dictionaries(st.sampled_from(["prompt", "model", "x"]), ANY, max_size=3))
)
KNOWN = "/ /health /status /metrics /version /tokenize /v1/models /v1/models/ /v1/completions /v1/chat/completions"
PATHS = st.sampled_from(KNOWN.split()) | st.text(
    st.characters(exclude_characters="?#\\", exclude_categories=["Cs", "Cc"]), max_size=9
).map("/".__add__)
HEADERS = st.dictionaries(
    st.sampled_from(["Content-Type", "Authorization", "Accept", "Range", "Origin", "Cookie", "X-Any"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20).map(str.strip),
    max_size=3,
)
# Values that are right by type and bounds, from the ends of both: what they do to sampling is the engine's affair.
EDGES = st.fixed_dictionaries(
    {"prompt": st.text(max_size=4).filter(bool) | st.lists(st.integers(0, 1023), min_size=1, max_size=5)},
    optional={
        "max_tokens": st.integers(1, 4),
        "temperature": st.sampled_from([0, 1e-300, 1e-6, 1e-5, 0.7, 100]),
        "top_p": st.sampled_from([0, 1e-300, 0.5, 1]),
        "top_k": st.sampled_from([-1, 0, 1, 2**31]),
        "min_p": st.sampled_from([0, 1e-300, 1]),
        "repetition_penalty": st.sampled_from([0.01, 1, 100]),
        "seed": st.sampled_from([-(2**63), 0, 2**64 - 1]),
        "logprobs": st.sampled_from([0, 20]),
        "n": st.sampled_from([1, 3]),
        "stop": st.sampled_from(["e", ["a", "\ud800"], ["x" * 1000]]) | st.text(min_size=1, max_size=2),
        "slo_ttft_ms": st.sampled_from([0.001, 86_400_000]),
        "stream": st.booleans(),
        "ignore_eos": st.booleans(),
    },
)


def told(answer):
    """Neither the status nor an event of a stream may be an error of the server's."""
    assert answer.status_code < 500 and '"server_error"' not in answer.text, answer.text
    if answer.status_code >= 400 and answer.status_code != 499:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return answer.status_code


JSON = {"Content-Type": "application/json"}


def post(server, path, body):
    return told(server.http.post(path, content=json.dumps(body), headers=JSON))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BODIES)
def test_no_body_makes_a_500(lasting, asked):
    assert post(lasting, *asked) in {200, 400, 404}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_make_a_500(lasting, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        answer = lasting.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert told(answer) in {200, 400}  # some bytes are a request


@pytest.mark.parametrize(
    "body",
    [
        "[" * 200_000,
        '{"prompt":' * 50_000,
        '{"a":' + "9" * 100_000 + "}",
        '{"prompt":1e999}',
        '{"prompt":"\\ud800"}',
        '{"n":-0.0}',
    ],
    ids=["deep arrays", "deep objects", "a long number", "infinity", "half a surrogate pair", "minus zero"],
)
def test_no_odd_json_makes_a_500(lasting, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        told(lasting.http.post(path, content=body, headers={"Content-Type": "application/json"}))


def test_no_depth_makes_a_500(lasting):
    """Of what the parser still takes, some would be too deep to be told of."""
    for depth in range(900, 1000):
        body = f'{{"prompt": "a", "stop": {"[" * depth}"a"{"]" * depth}}}'
        assert told(lasting.http.post("/v1/completions", content=body, headers=JSON)) == 400


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]), PATHS, HEADERS, st.binary(max_size=20))
def test_no_path_makes_a_500(lasting, method, path, headers, body):
    told(lasting.http.request(method, path, headers=headers, content=body, params={"q": path}))


@pytest.fixture(scope="module")
def bard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    model = MoEModel.from_pretrained("bard", expert_slots="25%", max_context=1024, cache_dir=folder)
    with serving(lambda: AsyncEngine(model)) as running:
        wait_ready(running)
        yield running


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EDGES)
def test_no_edge_of_what_is_allowed_makes_a_500_in_the_real_engine(bard, body):
    assert post(bard, "/v1/completions", body) in {200, 400}
