"""Bodies of any shape find no 500: every field that is known, with values of any type."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import serving, wait_ready
from tests.server.fake_service import FakeService

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=8)
)
ANY = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "king"]) | ANY, "content": st.text(max_size=6) | ANY},
    optional={"name": ANY},
)
NAMES = """
    model max_tokens max_completion_tokens n best_of logprobs top_logprobs stream stream_options temperature top_p
    top_k min_p repetition_penalty stop seed ignore_eos echo suffix logit_bias tools functions response_format user
    presence_penalty frequency_penalty slo_ttft_ms slo_tpot_ms chat_template chat_template_kwargs unknown
"""
FIELDS = st.dictionaries(st.sampled_from(NAMES.split()), ANY, max_size=3)
PROMPT = st.text(max_size=6) | st.lists(st.integers(-1, 300), max_size=4) | ANY
BODIES = st.tuples(
    st.just("/v1/completions"), st.builds(lambda fields, prompt: {**fields, "prompt": prompt}, FIELDS, PROMPT)
) | st.tuples(
    st.just("/v1/chat/completions"),
    st.builds(lambda fields, messages: {**fields, "messages": messages}, FIELDS, st.lists(MESSAGE, max_size=3) | ANY),
)


@pytest.fixture(scope="module")
def lasting():
    service = FakeService()
    with serving(lambda: service) as running:
        wait_ready(running)
        yield running


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BODIES)
def test_no_body_makes_a_500(lasting, asked):
    path, body = asked
    answer = lasting.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in {200, 400, 404}, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_make_a_500(lasting, body):
    for path in ("/v1/completions", "/tokenize"):
        answer = lasting.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
