"""``duoserve bench serve`` against a server whose times are known, and against those that fail."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from duoserve.errors import OverloadedError, RequestError
from tests.server.conftest import served  # noqa: F401 - a fixture
from tests.server.fake_service import script_of, spoken

FIRST_S, NEXT_S = 0.15, 0.05
ANSWER = [FIRST_S, *spoken("a"), NEXT_S, *spoken("b"), NEXT_S, *spoken("c")]
SMALL = ("--max-prompt", "4", "--max-tokens", "4")


def slow(steps=tuple(ANSWER)):
    """Three tokens at known times; the last one ends the answer."""
    pieces = [step if isinstance(step, float) else replace(step, finish_reason=None) for step in steps[:-1]]
    return script_of(*pieces, steps[-1])


def test_latencies_are_those_of_the_server(duoserve, served):  # noqa: F811
    server = served(slow())
    ran = duoserve(
        "bench", "serve", "--url", server.url, "--rate", "20", "--requests", "6", *SMALL,
        "--slo-ttft-ms", "2000", "--slo-tpot-ms", "1000", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    [trial] = json.loads(ran.out)["trials"]
    assert (trial["requests"], trial["failed"], trial["attained"]) == (6, 0, 1.0)
    assert FIRST_S * 1e3 <= trial["ttft_ms"]["p50"] < 2000
    assert NEXT_S * 1e3 * 0.8 <= trial["tpot_ms"]["p50"] < 1000
    assert all(asked["params"].max_tokens <= 4 for asked in server.service.asked)


def test_nothing_is_said_of_objectives_if_there_are_none(duoserve, served):  # noqa: F811
    words = ("bench", "serve", "--url", served(slow()).url, "--rate", "40", "--requests", "2", *SMALL)
    ran = duoserve(*words)
    assert ran.code == 0 and "0 of 2 failed" in ran.out and "objectives" not in ran.out
    assert json.loads(duoserve(*words, "--json").out)["trials"][0]["attained"] is None


def test_the_search_for_goodput_says_what_it_found(duoserve, served):  # noqa: F811
    server = served(slow())
    words = ("--rate", "40", "--requests", "3", *SMALL, "--goodput", "--trials", "2")
    good = duoserve("bench", "serve", "--url", f"{server.url}/v1", *words, "--slo-ttft-ms", "5000")
    assert good.code == 0 and "goodput: 80 requests/s with 90% inside objectives (no rate was too high" in good.out
    bad = duoserve("bench", "serve", "--url", server.url, *words, "--slo-ttft-ms", "1")
    assert bad.code == 0 and "goodput: none found; 20 requests/s are too many" in bad.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--url", "http://127.0.0.1:9"), "--url: no server answers at http://127.0.0.1:9"),
        (("--url", "nonsense"), "--url: no server answers at"),
        (("--url", "http://[::1"), "--url: 'http://[::1' is no URL"),
        (("--url", "\udcff"), "--url: '\\udcff' is no URL"),
        (("--url", "http://127.0.0.1:9", "--api-key", "s3cret\udcff"), "--api-key: no request can show"),
        (("--url", "http://127.0.0.1:9", "--api-key", "s3\ncret"), "--api-key: no request can show"),
        (("--url", "http://127.0.0.1:9", "--goodput"), "--goodput counts requests inside objectives: give --slo-ttft"),
    ],
)
def test_what_cannot_be_measured_is_refused(duoserve, words, said):
    ran = duoserve("bench", "serve", *words)
    assert ran.code == 1 and said in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "http://127.0.0.1:9"])
def test_no_proxy_stands_between_the_load_and_the_server(duoserve, served, monkeypatch, proxy):  # noqa: F811
    server = served(script_of(*spoken("a")))
    monkeypatch.setenv("ALL_PROXY", proxy)
    ran = duoserve("bench", "serve", "--url", server.url, "--requests", "2", "--rate", "50", *SMALL)
    assert ran.code == 0, ran.err


def test_another_model_or_key_is_named(duoserve, served):  # noqa: F811
    server = served(api_key="rïght")
    ran = duoserve("bench", "serve", "--url", server.url, "--api-key", "wrong")
    assert ran.code == 1 and "--api-key" in ran.err and "(401)" in ran.err
    ran = duoserve("bench", "serve", "--url", server.url, "--api-key", "rïght", "--model", "other")
    assert ran.code == 1 and "serves fake, not other" in ran.err


def test_the_first_error_is_shown_when_all_fail(duoserve, served):  # noqa: F811
    server = served(script_of(refuse=RequestError("the prompt is cursed")))
    ran = duoserve("bench", "serve", "--url", server.url, "--requests", "2", "--rate", "50", *SMALL)
    assert ran.code == 1 and "all 2 requests failed; the first: 400: " in ran.err and "cursed" in ran.err


def test_a_rate_at_which_nothing_is_answered_is_a_bad_one_and_no_failure(duoserve, served):  # noqa: F811
    server = served(lambda number: spoken("a") if number < 2 else full())
    words = ("--rate", "50", "--requests", "2", *SMALL, "--goodput", "--trials", "2", "--slo-ttft-ms", "5000", "--json")
    ran = duoserve("bench", "serve", "--url", server.url, *words)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert [trial["failed"] for trial in found["trials"]] == [0, 2]
    assert (found["goodput"], found["not_good"]) == (50, 100)


def full():
    raise OverloadedError("full", 1.0)


def test_latencies_count_from_when_a_request_was_due(duoserve, served, monkeypatch):  # noqa: F811
    """A generator that falls behind its own plan must not make the server look faster than a user would find it."""
    server, sleep = served(script_of(*spoken("a"))), asyncio.sleep

    async def oversleeping(seconds):
        await sleep(max(0, seconds) + 0.2)

    monkeypatch.setattr("duoserve.loadtest.client.asyncio.sleep", oversleeping)
    ran = duoserve("bench", "serve", "--url", server.url, "--requests", "3", "--rate", "50", *SMALL, "--json")
    [trial] = json.loads(ran.out)["trials"]
    assert trial["ttft_ms"]["p50"] > 200 and trial["late_ms"] > 200
    text = duoserve("bench", "serve", "--url", server.url, "--requests", "3", "--rate", "50", *SMALL)
    assert "this side is too slow for the load" in text.out


def test_chats_are_asked_for_where_a_server_has_nothing_else(duoserve, served):  # noqa: F811
    server = served(script_of(*spoken("a", "b")))
    words = ("--requests", "2", "--rate", "50", "--max-prompt", "1", "--max-tokens", "4", "--chat", "--ignore-eos")
    ran = duoserve("bench", "serve", "--url", server.url, *words, "--json")
    assert ran.code == 0, ran.err
    [trial] = json.loads(ran.out)["trials"]
    assert (trial["failed"], trial["requests"]) == (0, 2) and trial["tokens_per_s"] > 0
    said = [server.service.model.tokenizer.decode(asked["prompt"]) for asked in server.service.asked]
    assert all(one.startswith("<user>") for one in said)
    assert all(asked["params"].ignore_eos for asked in server.service.asked)


@pytest.mark.parametrize("flag", ["--rate", "--requests", "--slo-ttft-ms", "--timeout"])
def test_numbers_out_of_bounds_are_wrong_usage(duoserve, flag):
    ran = duoserve("bench", "serve", "--url", "http://127.0.0.1:9", flag, "0")
    assert ran.code == 2 and flag in ran.err
