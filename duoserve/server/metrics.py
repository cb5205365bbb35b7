"""``/metrics`` in Prometheus's text format: vLLM's metrics under ``duoserve:``, and the costs of moving experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import get_args

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from duoserve.interface import FinishReason, ServiceFigures
from duoserve.server.records import Record

FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
PER_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 960, 1920)
HISTOGRAMS = {
    "time_to_first_token_seconds": ("from arrival to the first token", FIRST_TOKEN),
    "inter_token_latency_seconds": ("between two tokens", PER_TOKEN),
    "request_time_per_output_token_seconds": ("mean time between the tokens of a request", PER_TOKEN),
    "e2e_request_latency_seconds": ("from arrival to the last token", REQUEST),
    "request_queue_time_seconds": ("from arrival to the start of the prefill", REQUEST),
    "request_prefill_time_seconds": ("from the start of the prefill to the first token", REQUEST),
    "request_decode_time_seconds": ("from the first token to the last", REQUEST),
}


class Metrics:
    """The metrics of a server for one model; its service's ``figures`` are asked for at each scrape."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, model_name: str, figures: Callable[[], ServiceFigures | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServiceCollector(model_name, figures))
        self._histograms = {
            name: Histogram(f"duoserve:{name}", text, ["model_name"], registry=self._registry, buckets=buckets).labels(
                model_name
            )
            for name, (text, buckets) in HISTOGRAMS.items()
        }

    def ended(self, record: Record) -> None:
        """Counts a request that has ended. If it was cut off, only the times of the tokens that it had count."""
        self._observe("time_to_first_token_seconds", record.ttft_s)
        for gap in record.gaps:
            self._observe("inter_token_latency_seconds", gap)
        if record.outcome not in {"stop", "length"}:
            return
        times = record.times
        self._observe("request_time_per_output_token_seconds", record.tpot_s)
        self._observe("e2e_request_latency_seconds", record.e2e_s)
        self._observe("request_queue_time_seconds", _between(times.arrived, times.admitted))
        self._observe("request_prefill_time_seconds", _between(times.admitted, times.first_token))
        self._observe("request_decode_time_seconds", _between(times.first_token, record.last_token))

    def text(self) -> bytes:
        """All metrics as they are now."""
        return generate_latest(self._registry)

    def _observe(self, name: str, seconds: float | None) -> None:
        if seconds is not None:
            self._histograms[name].observe(seconds)


class _ServiceCollector(Collector):
    """Collects the service's own figures at each scrape; gives nothing before there is a service."""

    def __init__(self, model_name: str, figures: Callable[[], ServiceFigures | None]) -> None:
        self._model_name = model_name
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        if figures is not None:
            yield from self._gauges(figures)
            yield from self._counters(figures)

    def _gauges(self, figures: ServiceFigures) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "requests that run", figures.running)
        yield self._gauge("num_requests_waiting", "requests that wait", figures.waiting)
        yield self._gauge("kv_cache_usage_perc", "share of the KV cache in use, 1 is all", figures.kv_usage)

    def _counters(self, figures: ServiceFigures) -> Iterator[Metric]:
        stats = figures.stats
        finished = {**dict.fromkeys(get_args(FinishReason), 0), **figures.finished}  # a rate needs the zeros before
        yield self._counter("prompt_tokens", "tokens of prompts", stats.prompt_tokens)
        yield self._counter("generation_tokens", "tokens generated", stats.output_tokens)
        yield self._counter("requests_refused", "requests refused because of others", figures.refused)
        yield self._counter("num_preemptions", "times that a request made way in the KV cache", figures.sent_back)
        yield self._counter("slo_requests", "requests with objectives that finished", figures.with_objectives)
        yield self._counter("slo_attained", "those of them inside all of their objectives", figures.attained)
        yield self._counter("stall_seconds", "computation waiting for copies", stats.stall_s)
        yield self._counter("compute_seconds", "computation", stats.compute_s)
        yield self._counter("transfer_seconds", "copies under way", stats.transfer_s)
        yield self._by("request_success", "requests that ended, by how", "finished_reason", finished.items())
        yield self._by("expert_hits", "experts asked for that were in a slot", "phase", stats.hits.items())
        yield self._by("expert_misses", "experts asked for that were not", "phase", stats.misses.items())
        yield self._by("expert_bytes", "bytes copied, by what they were good for", "use", asdict(stats.bytes).items())

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"duoserve:{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"duoserve:{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _by(self, name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
        family = CounterMetricFamily(f"duoserve:{name}", text, labels=["model_name", label])
        for kind, value in values:
            family.add_metric([self._model_name, kind], value)
        return family


def _between(since: float | None, until: float | None) -> float | None:
    return None if since is None or until is None else until - since
