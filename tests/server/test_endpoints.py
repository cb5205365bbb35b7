"""What each endpoint answers, whole: shapes, statuses, errors, bounds."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from types import SimpleNamespace

import pytest

from duoserve.errors import DuoServeError, OverloadedError
from tests.fakes import PATIENCE_S
from tests.server.conftest import NAME
from tests.server.fake_service import CONTEXT, FakeModel, hoped, script_of, spoken, with_logprobs

SAID = "<user>hi<assistant>"


def length(text):
    """Of a text, in tokens."""
    return len(FakeModel().tokenizer.encode(text))


def test_a_completion_is_in_openais_form(served):
    server = served()
    body = server.complete(max_tokens=5, temperature=0).json()
    assert body.pop("id").startswith("cmpl-") and body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": NAME,
        "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": length("the cat"), "completion_tokens": 2, "total_tokens": length("the cat") + 2},
    }
    asked = server.service.asked[0]
    assert (asked["params"].max_tokens, asked["params"].temperature, asked["logprobs"]) == (5, 0.0, None)
    assert asked["prompt"] == server.service.model.tokenizer.encode("the cat")


def test_a_chat_completion_is_in_openais_form(served):
    server = served(script_of(*spoken("Good", " day", finish="length")))
    body = server.chat().json()
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 1_700_000_000
    message = {"role": "assistant", "content": "Good day", "refusal": None}
    assert body == {
        "object": "chat.completion",
        "model": NAME,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": length(SAID), "completion_tokens": 2, "total_tokens": length(SAID) + 2},
    }
    asked = server.service.asked[0]
    assert server.service.model.tokenizer.decode(asked["prompt"]) == SAID
    assert asked["params"].max_tokens == CONTEXT - length(SAID)  # all that there is room for


def test_messages_may_have_text_in_parts_and_a_developer(served):
    server = served()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "c"}, {"role": "user", "content": parts}]
    assert server.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    said = server.service.model.tokenizer.decode(server.service.asked[0]["prompt"])
    assert said == "<system>c<user>a\nb<assistant>"


def test_what_asks_for_what_is_done_anyway_is_not_refused(served):
    server = served()
    both = {"skip_special_tokens": True, "add_generation_prompt": True}
    assert server.complete(**both, add_special_tokens=True).status_code == 200
    message = CALLING | {"tool_calls": [], "function_call": None, "refusal": None}
    assert server.chat(**both, add_special_tokens=False, messages=[message]).status_code == 200
    assert server.chat(add_special_tokens=None, skip_special_tokens=None).status_code == 200


def test_several_prompts_and_n_make_choices_in_order(served):
    server = served(lambda number: spoken(str(number)))
    body = server.complete(prompt=["a", "bc"], n=2, seed=7).json()
    assert [(one["index"], one["text"]) for one in body["choices"]] == [(0, "0"), (1, "1"), (2, "2"), (3, "3")]
    assert body["usage"] == {
        "prompt_tokens": length("a") + length("bc"),
        "completion_tokens": 4,
        "total_tokens": length("a") + length("bc") + 4,
    }
    assert [one["params"].seed for one in server.service.asked] == [7, 8, 7, 8]
    server.complete(n=3, seed=2**64 - 2)
    assert [one["params"].seed for one in server.service.asked[4:]] == [2**64 - 2, 2**64 - 1, 0]


def test_equal_prompts_are_counted_each(served):
    assert served().complete(prompt=["ab", "ab"]).json()["usage"]["prompt_tokens"] == 2 * length("ab")


def test_token_ids_are_prompts(served):
    server = served()
    assert server.complete(prompt=[5, 6, 7]).status_code == 200
    assert server.complete(prompt=[[5], [6, 7]]).status_code == 200
    assert [one["prompt"] for one in server.service.asked] == [[5, 6, 7], [5], [6, 7]]


def test_objectives_of_the_body_reach_the_service(served):
    server = served()
    server.complete(slo_ttft_ms=500)
    server.complete(slo_tpot_ms=20)
    server.complete()
    asked = [one["objectives"] for one in server.service.asked]
    assert asked == [hoped(0.5, None), hoped(None, 0.02), hoped(None, None)]


def test_sampling_fields_arrive_and_unknown_ones_are_ignored(served):
    server = served()
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "stop": ["x"], "seed": 3, "user": "me"}
    nothing = {"min_tokens": 0, "stop_token_ids": [], "use_beam_search": False, "response_format": {"type": "text"}}
    nothing |= {"length_penalty": 1, "documents": [], "logits_processors": None, "reasoning_effort": None}
    assert server.complete(**fields, **nothing, what_is_this={"a": [1]}).status_code == 200
    params = server.service.asked[0]["params"]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    assert (params.stop, params.seed, params.max_tokens) == (("x",), 3, 16)


def test_log_probabilities_in_the_form_of_completions(served):
    server = served(script_of(with_logprobs("a", 65), with_logprobs("", 200, "stop")))
    found = server.complete(logprobs=2).json()["choices"][0]["logprobs"]
    first, second = (server_label(server, token) for token in (65, 200))
    assert found["tokens"] == [first, second]
    assert found["token_logprobs"] == [-0.25, -0.25]
    assert found["top_logprobs"][0] == {first: -0.25, second: -9999.0}
    assert found["text_offset"] == [0, len(first)]
    assert server.service.asked[0]["logprobs"] == 2


def server_label(server, token_id):
    tokenizer = server.service.model.tokenizer
    data = tokenizer.token_bytes(tokenizer.token(token_id))
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def test_log_probabilities_in_the_form_of_chat(served):
    server = served(script_of(with_logprobs("a", 65, "stop")))
    found = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    tokenizer = server.service.model.tokenizer
    data = tokenizer.token_bytes(tokenizer.token(65))
    entry = {"token": data.decode(errors="replace"), "logprob": -0.25, "bytes": list(data)}
    assert [{name: found[0][name] for name in entry}] == [entry]
    assert found[0]["top_logprobs"][0] == entry and len(found[0]["top_logprobs"]) == 2


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


@pytest.fixture(scope="module")
def lasting():
    """One server for all that is refused before the service hears of it."""
    from tests.server.conftest import serving, wait_ready
    from tests.server.fake_service import FakeService

    service = FakeService()
    with serving(lambda: service) as running:
        running.service = service
        wait_ready(running)
        yield running


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


def test_models_version_and_tokenize(lasting):
    listed = lasting.http.get("/v1/models").json()
    assert [(one["id"], one["object"], one["max_model_len"]) for one in listed["data"]] == [(NAME, "model", CONTEXT)]
    assert lasting.http.get(f"/v1/models/{NAME}").json() == listed["data"][0]
    assert lasting.http.get("/version").json().keys() == {"version"}
    found = lasting.post("/tokenize", {"prompt": "the cat"}).json()
    assert found == {
        "count": length("the cat"),
        "max_model_len": CONTEXT,
        "tokens": lasting.service.model.tokenizer.encode("the cat"),
    }
    assert lasting.post("/tokenize", {}).json()["error"]["param"] == "prompt"
    bare = {"prompt": "the cat", "add_special_tokens": False}
    assert lasting.post("/tokenize", bare).json()["error"]["param"] == "add_special_tokens"


def test_an_overloaded_service_is_a_429_that_says_when_to_try_again(served):
    server = served(script_of(refuse=OverloadedError("256 requests wait", 2.1)))
    answer = server.complete()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"] == {
        "message": "256 requests wait",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }


def test_when_one_choice_is_refused_the_others_are_taken_back(served):
    def script(number):
        if number == 2:
            raise OverloadedError("full", 1.0)
        return [60.0, *spoken("never")]

    server = served(script)
    assert server.complete(n=3).status_code == 429
    assert [stream.cancelled_at is not None for stream in server.service.streams] == [True, True]


def test_a_request_that_the_engine_refuses_is_a_400(served):
    answer = served().complete(prompt=[5, 100_000])
    assert answer.status_code == 400 and "outside the vocabulary" in answer.json()["error"]["message"]


def test_what_the_model_lacks_is_said(served):
    bare = served(model=FakeModel(tokenizer=None, chat_template=None))
    assert "no chat template" in bare.chat().json()["error"]["message"]
    assert "no tokenizer" in bare.complete().json()["error"]["message"]
    assert bare.complete(prompt=[1, 2], logprobs=0).status_code == 200


def test_a_text_that_takes_too_long_is_a_400_and_the_loop_goes_on(served):
    over = threading.Event()
    slow = SimpleNamespace(render=lambda *messages, **how: str(over.wait(PATIENCE_S)))
    server = served(model=FakeModel(chat_template=slow), text_s=1.0)
    answer = server.chat()
    assert answer.status_code == 400 and "longer than 1 s" in answer.json()["error"]["message"]
    assert server.complete().status_code == 200
    over.set()


def test_a_failure_of_one_request_is_a_500_and_the_next_is_served(served):
    failing = DuoServeError("the model produced non-finite logits")
    server = served(lambda number: [failing] if number == 0 else spoken("fine"))
    answer = server.complete()
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "non-finite logits" in answer.json()["error"]["message"]
    assert server.complete().json()["choices"][0]["text"] == "fine"


def test_what_nobody_foresaw_is_a_500_that_says_nothing_of_the_inside(served):
    answer = served(script_of(refuse=asyncio.InvalidStateError("secret"))).complete()
    assert answer.status_code == 500 and "secret" not in answer.text
