"""What each endpoint answers, whole: shapes, statuses, and the errors of a service that cannot."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

from duoserve.errors import DuoServeError, OverloadedError
from tests.helpers.fakes import PATIENCE_S
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


def test_tokenize_gives_the_vocabularys_entries_too(lasting):
    asked = {"prompt": "the café</s>", "return_token_strs": True}
    found = lasting.post("/tokenize", asked).json()
    assert len(found["token_strs"]) == found["count"] and found["token_strs"][-1] == "</s>"
    assert "".join(found["token_strs"]) == "theĠcafÃ©</s>"
    wrong = {"prompt": "a", "return_token_strs": "yes"}
    assert lasting.post("/tokenize", wrong).json()["error"]["param"] == "return_token_strs"


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
