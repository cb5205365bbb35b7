"""/metrics read by Prometheus's own parser, and what the status page is given."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client import parser

from duoserve.errors import CopyError
from duoserve.interface import Piece, Times
from duoserve.metrics import ByteCounts, Stats
from duoserve.server.records import Record, RequestLog
from tests.server.conftest import NAME
from tests.server.fake_service import FakeModel, FakeTemplate, hoped, script_of, spoken

VLLM = {
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
}


def scrape(server):
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in parser.text_string_to_metric_families(answer.text)}


def values(family):
    """By the labels beside the model's name, which every sample has."""
    for sample in family.samples:
        assert sample.labels.pop("model_name") == NAME
    names = [(one.name.removeprefix(family.name), *one.labels.values()) for one in family.samples]
    return dict(zip(names, (one.value for one in family.samples), strict=True))


def some_stats():
    return Stats(
        prompt_tokens=11,
        output_tokens=22,
        hits={"prefill": 1, "decode": 30},
        misses={"prefill": 2, "decode": 10},
        bytes=ByteCounts(100, 200, 300, 400),
        compute_s=1.5,
        stall_s=0.5,
        transfer_s=0.75,
    )


def test_vllms_names_are_there_with_their_types(served):
    families = scrape(served())
    assert {name: families[f"duoserve:{name}"].type for name in VLLM} == VLLM


def test_the_services_figures_arrive(served):
    server = served()
    server.service.stats = some_stats()
    server.complete()
    families = scrape(server)

    def value(name, *labels):
        return values(families[f"duoserve:{name}"])[labels]

    assert (value("num_requests_running", ""), value("num_requests_waiting", "")) == (0, 2)
    assert value("kv_cache_usage_perc", "") == 0.25
    assert (value("prompt_tokens", "_total"), value("generation_tokens", "_total")) == (11, 22)
    assert value("request_success", "_total", "stop") == 1
    assert (value("expert_hits", "_total", "decode"), value("expert_misses", "_total", "prefill")) == (30, 2)
    assert value("expert_bytes", "_total", "prefetched_late") == 300
    assert (value("stall_seconds", "_total"), value("transfer_seconds", "_total")) == (0.5, 0.75)
    assert (value("requests_refused", "_total"), value("slo_attained", "_total")) == (3, 4)
    assert (value("slo_requests", "_total"), value("num_preemptions", "_total")) == (5, 6)


def test_every_way_to_end_is_counted_from_the_start(served):
    counted = values(scrape(served())["duoserve:request_success"])
    assert counted == {("_total", reason): 0 for reason in ("stop", "length", "abort", "error")}


def test_latencies_are_those_of_the_requests(served):
    a, b, c = spoken("a", "b", "c")
    server = served(lambda number: [0.1, a, 0.3, b, c] if number == 0 else [a, CopyError("gone")])
    first_s, second_s = completed(server), completed(server)
    families = scrape(server)

    def histogram(name):
        found = values(families[f"duoserve:{name}"])
        return found[("_count",)], found[("_sum",)]

    count, total = histogram("inter_token_latency_seconds")
    assert count == 2 and 0.3 <= total <= first_s - 0.1
    count, total = histogram("time_to_first_token_seconds")
    assert count == 2 and 0.1 <= total <= first_s - 0.3 + second_s
    for name, low in (("e2e_request_latency_seconds", 0.4), ("request_decode_time_seconds", 0.3)):
        count, total = histogram(name)
        assert count == 1 and low <= total <= first_s - (0.4 - low), name
    count, total = histogram("request_time_per_output_token_seconds")
    assert count == 1 and 0.15 <= total <= (first_s - 0.1) / 2


def test_a_first_token_is_timed_from_the_arrival_of_its_request(served):
    """Not from when its prompt has been made, which may take long itself."""

    class SlowTemplate(FakeTemplate):
        def render(self, messages, add_generation_prompt=True):
            time.sleep(0.3)
            return super().render(messages, add_generation_prompt)

    server = served(model=FakeModel(chat_template=SlowTemplate()))
    assert server.chat().status_code == 200
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert values(scrape(server)[f"duoserve:{name}"])[("_sum",)] >= 0.3, name


def completed(server, **fields):
    """How long that took, as its client sees it."""
    began = time.monotonic()
    assert server.complete(**fields).status_code in (200, 500)
    return time.monotonic() - began


def test_the_status_tells_latencies_and_objectives(served):
    server = served(lambda number: [0.05, *spoken("a", "b")], objectives=hoped(0.02, 1.0))
    server.service.stats = some_stats()
    fastest_s = min(completed(server), completed(server, slo_ttft_ms=5000))
    found = server.http.get("/status").json()
    assert (found["model"], found["state"], found["policy"]) == (NAME, "ready", "lru")
    assert found["objectives"] == {"ttft_ms": 20.0, "tpot_ms": 1000.0}
    assert found["latency"]["requests"] == 2 and 50 <= found["latency"]["ttft_ms"]["p50"] <= 1000 * fastest_s
    assert [(one["state"], one["attained"]) for one in found["requests"]] == [("stop", True), ("stop", False)]
    service = found["service"]
    assert service["hit_rate"] == 31 / 43 and service["bytes"]["total"] == 1000
    assert (service["attained"], service["with_objectives"], service["refused"]) == (4, 5, 3)
    assert service["sent_back"] == 6


def test_the_status_has_latencies_by_nearest_rank(served):
    waits = iter([0.4, 0.1, 0.8, 0.2])
    server = served(lambda number: [next(waits), *spoken("a")])
    _, second_s, _, fourth_s = sorted(completed(server) for _ in range(4))
    ttft = server.http.get("/status").json()["latency"]["ttft_ms"]
    assert 200 <= ttft["p50"] <= 1000 * second_s and 800 <= ttft["p95"] <= 1000 * fourth_s


def test_a_request_runs_as_soon_as_its_prefill_begins(served):
    server = served(script_of(0.6, *spoken("late")))

    def shown():
        [row] = server.http.get("/status").json()["requests"]
        return row["state"], row["ttft_ms"]

    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.complete)
        while not server.service.streams:
            time.sleep(0.005)
        stream = server.service.streams[0]
        assert shown() == ("waiting", None)
        stream.times = replace(stream.times, admitted=time.monotonic())
        assert shown() == ("running", None)
        assert answer.result().status_code == 200
    state, ttft_ms = shown()
    assert state == "stop" and ttft_ms > 0
    stream.times = Times(0.0)
    assert shown() == (state, ttft_ms)


def test_of_requests_that_ended_no_gap_of_any_token_is_kept():
    request_log, heard = RequestLog(), []
    request_log.listeners.append(lambda record: heard.append(len(record.gaps)))
    record = Record("a", 1, hoped(None, None), lambda: Times(0.0, 1.0, 2.0))
    request_log.begin(record)
    for _ in range(3):
        request_log.piece(record, Piece("x", (5,)))
    request_log.end(record, "length")
    assert heard == [2] and record.gaps == [] and record.tpot_s is not None


@pytest.mark.parametrize(
    ("objectives", "first_token", "later", "attained"),
    [
        (hoped(2.0, 0.5), None, [], None),
        (hoped(2.0, 0.5), 2.0, [], True),
        (hoped(2.0, 0.5), 2.5, [], False),
        (hoped(None, 0.5), 2.5, [], None),
        (hoped(None, 0.5), 2.5, [2.9, 3.5], True),
        (hoped(2.0, 0.5), 2.0, [2.6], False),
        (hoped(None, None), 2.0, [2.5], None),
    ],
)
def test_a_request_is_judged_once_there_is_something_to_compare(objectives, first_token, later, attained):
    clock = iter(later)
    request_log = RequestLog(lambda: next(clock))
    record = Record("a", 1, objectives, lambda: Times(0.0, 0.0, first_token))
    for _ in [] if first_token is None else [first_token, *later]:
        request_log.piece(record, Piece("x", (5,)))
    assert record.attained is attained
