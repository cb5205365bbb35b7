"""The data of the status page, as JSON: the service as it is now, and latencies of the last requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from duoserve.interface import Objectives, ServiceFigures
from duoserve.metrics import percentile
from duoserve.server.host import ServiceLoader
from duoserve.server.records import Record, RequestLog
from duoserve.server.settings import ServerSettings

SHOWN = 12  # requests in the table
PAGE = files("duoserve.server").joinpath("status.html").read_bytes()
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def status(loader: ServiceLoader, request_log: RequestLog, settings: ServerSettings, since: float) -> dict[str, Any]:
    """All data of the page. ``since`` is when the server began, in seconds of ``time.monotonic``."""
    service = loader.known
    ended = list(request_log.ended)
    return {
        "model": settings.name,
        "state": loader.state,
        "policy": None if service is None else service.model.policy,
        "uptime_s": time.monotonic() - since,
        "objectives": _milliseconds(Objectives() if service is None else service.objectives),
        "latency": _latencies(ended),
        "service": None if service is None else _figures(service.figures()),
        "requests": [_row(one) for one in [*request_log.live, *reversed(ended)][:SHOWN]],
    }


def _figures(figures: ServiceFigures) -> dict[str, Any]:
    stats = figures.stats.to_dict()
    names = ("prompt_tokens", "output_tokens", "hit_rate", "hit_rate_prefill", "hit_rate_decode")
    bytes_by_use = {name.removeprefix("bytes_"): value for name, value in stats.items() if name.startswith("bytes_")}
    return {
        "running": figures.running,
        "waiting": figures.waiting,
        "kv_usage": figures.kv_usage,
        "finished": dict(figures.finished),
        "refused": figures.refused,
        "sent_back": figures.sent_back,
        "attained": figures.attained,
        "with_objectives": figures.with_objectives,
        "bytes": bytes_by_use,
        **{name: stats[name] for name in (*names, "compute_s", "stall_s", "transfer_s")},
    }


def _latencies(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "requests": len(records),
        "ttft_ms": _spread(one.ttft_s for one in records),
        "tpot_ms": _spread(one.tpot_s for one in records),
    }


def _spread(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """Median and 95th percentile in milliseconds, by nearest rank."""
    known = [1000 * value for value in seconds if value is not None]
    return {f"p{percent}": percentile(known, percent) for percent in (50, 95)} if known else None


def _row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "state": record.outcome or ("running" if record.times.admitted is not None else "waiting"),
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "ttft_ms": _ms(record.ttft_s),
        "tpot_ms": _ms(record.tpot_s),
        "attained": record.attained,
    }


def _milliseconds(objectives: Objectives) -> dict[str, float | None]:
    return {"ttft_ms": _ms(objectives.ttft_s), "tpot_ms": _ms(objectives.tpot_s)}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
