"""Fields of newer clients: what would change the answer is refused, what asks for nothing is not."""

from __future__ import annotations

import pytest

WRONG = [
    ({"verbosity": "low"}, "verbosity"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"modalities": "text"}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"guided_json": {}}, "guided_json"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    ({"repetition_detection": {"max_pattern_size": 4}}, "repetition_detection"),
    ({"thinking_token_budget": 64}, "thinking_token_budget"),
    ({"thinking_token_budget": 0}, "thinking_token_budget"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"best_of": 2}, "best_of"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
]
NOTHING = [
    {"modalities": ["text"], "verbosity": "medium", "chat_template_kwargs": {}},
    {"return_token_ids": False, "vllm_xargs": {}, "best_of": 2, "n": 2},
    {"stream": True, "stream_options": {"continuous_usage_stats": False}},
    dict.fromkeys(
        ("modalities", "verbosity", "audio", "web_search_options", "prompt_logprobs", "chat_template_kwargs")
    ),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_what_would_change_the_answer_is_refused(served, fields, param):
    server = served()
    for answer in (server.chat(**fields), server.complete(**fields)):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert server.service.streams == []


@pytest.mark.parametrize("fields", NOTHING, ids=["as it is done", "switched off", "usage at the end", "null"])
def test_what_asks_for_nothing_is_not(served, fields):
    server = served()
    assert [server.chat(**fields).status_code, server.complete(**fields).status_code] == [200, 200]
