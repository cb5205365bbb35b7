"""What a client that asks wrongly is told: of fields, bodies, headers, paths."""

from __future__ import annotations

import http.client
import json
import time

import pytest

from tests.server.fake_service import CONTEXT

WRONG = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": CONTEXT}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1_000_000}, "n"),
    ({"prompt": ["a"] * 100, "n": 16}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 1_000_000}, "logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"stop_token_ids": [13]}, "stop_token_ids"),
    ({"guided_regex": "[0-9]+"}, "guided_regex"),
    ({"structural_tag": "{}"}, "structural_tag"),
    ({"logits_processors": ["a.b"]}, "logits_processors"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"length_penalty": 0}, "length_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"model": 5}, "model"),
    ({"slo_ttft_ms": 0}, "slo_ttft_ms"),
    ({"slo_tpot_ms": "fast"}, "slo_tpot_ms"),
    ({"chat_template": "x"}, "chat_template"),
    ({"add_special_tokens": False}, "add_special_tokens"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_a_400_that_names_it(lasting, fields, param):
    answer = lasting.complete(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert len(error["message"]) < 300
    assert lasting.service.streams == []


CALLING = {"role": "assistant", "content": None}
WRONG_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "unrenderable"}]}, "messages"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"documents": [{"title": "a", "text": "b"}]}, "documents"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"messages": [CALLING | {"tool_calls": [{"type": "function"}]}]}, "messages[0].tool_calls"),
    ({"messages": [CALLING | {"function_call": {"name": "f"}}]}, "messages[0].function_call"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"add_special_tokens": True}, "add_special_tokens"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_CHATS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_of_a_chat_is_a_400_that_names_it(lasting, fields, param):
    answer = lasting.chat(**fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert lasting.service.streams == []


def test_what_exceeds_the_context_has_the_code_that_clients_look_for(lasting):
    fault, asked = "prompt", lasting.complete(prompt=[1] * CONTEXT, max_tokens=1)
    for answer in (asked, lasting.complete(max_tokens=CONTEXT), lasting.chat(max_tokens=CONTEXT)):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, fault, "context_length_exceeded")
        assert error["message"].startswith(f"this model's maximum context length is {CONTEXT} tokens, but there are ")
        fault = "max_tokens"
    messages = [{"role": "user", "content": "word " * 2 * CONTEXT}]
    error = lasting.chat(messages=messages).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert lasting.service.streams == []


def test_no_likeliest_tokens_may_be_asked_for_without_log_probabilities(served):
    assert served().chat(logprobs=False, top_logprobs=0).status_code == 200


def test_what_asks_for_what_is_done_anyway_is_not_refused(served):
    server = served()
    both = {"skip_special_tokens": True, "add_generation_prompt": True}
    assert server.complete(**both, add_special_tokens=True).status_code == 200
    message = CALLING | {"tool_calls": [], "function_call": None, "refusal": None}
    assert server.chat(**both, add_special_tokens=False, messages=[message]).status_code == 200
    assert server.chat(add_special_tokens=None, skip_special_tokens=None).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'"x"',
        b"null",
    ],
    ids=["empty", "cut", "array", "nan", "deep", "digits", "bytes", "text", "null"],
)
def test_a_body_that_is_no_json_object_is_a_400(lasting, body):
    answer = lasting.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_half_a_surrogate_pair_makes_no_500(lasting):
    for body in ('{"prompt": "\\ud800"}', '{"prompt": "a", "model": "\\ud800"}', '{"prompt": "a", "n": "\\udfff"}'):
        kind = {"Content-Type": "application/json"}
        assert lasting.http.post("/v1/completions", content=body, headers=kind).status_code in {200, 400, 404}
    lasting.service.streams.clear()
    said = '{"messages": [{"role": "user", "content": "unrenderable \\ud800"}]}'
    refused = lasting.http.post("/v1/chat/completions", content=said, headers=kind)
    assert refused.status_code == 400 and refused.json()["error"]["message"].endswith("\ud800")


def test_a_body_of_another_type_or_too_large_is_refused(served):
    server = served(max_body_bytes=1000)
    assert server.http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    large = {"prompt": "x" * 1000}
    assert server.post("/v1/completions", large).status_code == 413
    chunks = (json.dumps(large)[start : start + 100].encode() for start in range(0, 1100, 100))
    kind = {"Content-Type": "application/json"}
    assert server.http.post("/v1/completions", content=chunks, headers=kind).status_code == 413
    assert server.complete().status_code == 200


def test_who_writes_all_of_a_body_that_is_too_large_hears_of_it(served):
    """A connection that is closed while the client writes would be a reset to it."""
    server, part = served(max_body_bytes=1000), b"x" * (1 << 20)
    connection = http.client.HTTPConnection(server.http.base_url.host, server.http.base_url.port)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(8 * len(part)))
    connection.endheaders()
    for _ in range(8):
        connection.send(part)
        time.sleep(0.05)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_header_that_is_too_large_is_refused(lasting):
    assert lasting.http.get("/health", headers={"X-Long": "x" * 40_000}).status_code in {400, 431}
    assert lasting.http.get("/health", headers={"X-Long": "x" * 20_000}).status_code == 200


def test_unknown_models_and_paths_are_404s_in_openais_form(lasting):
    answer = lasting.complete(model="gpt-9")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for path in ("/v1/models/gpt-9", "/v1/embeddings", "/invocations"):
        answer = lasting.http.get(path)
        assert answer.status_code == 404 and "message" in answer.json()["error"]
    assert lasting.http.get("/v1/completions").status_code == 405
