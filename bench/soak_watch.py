"""A process under observation: its memory, files and threads by the requests that it has served, and its health."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

EVERY_S = 0.25  # a short run must have looked at the second quarter too
WARM, LATE = 0.25, 0.75  # memory is compared between the quarter of requests behind the first, and the last


@dataclass(frozen=True)
class Sample:
    """One look at the process, after ``requests`` had ended."""

    requests: int
    rss_bytes: int
    anonymous_bytes: int
    threads: int
    files: int


def look(process_id: int, requests: int) -> Sample:
    """The process as it is now."""
    folder = Path(f"/proc/{process_id}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    rss, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return Sample(requests, rss, anonymous, int(fields["Threads"]), len(list((folder / "fd").iterdir())))


async def watch(
    process_id: int,
    http: httpx.AsyncClient,
    ended: Callable[[], int],
    samples: list[Sample],
    fault: Callable[[str], None],
) -> None:
    """Until it is cancelled: a sample and a round of those who watch a server, every ``EVERY_S``."""
    while True:
        samples.append(look(process_id, ended()))
        for path in ("/health", "/metrics", "/status"):
            answer = await http.get(path)
            if answer.status_code != 200:
                fault(f"{path} said {answer.status_code}")
        await asyncio.sleep(EVERY_S)


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """From the quarter of requests behind the first to the last: anonymous memory in medians, files and threads."""
    last = samples[-1].requests
    early = [one for one in samples if WARM * last <= one.requests < 2 * WARM * last] or list(samples[:1])
    late = [one for one in samples if one.requests >= LATE * last]
    before, after = (median(one.anonymous_bytes for one in part) for part in (early, late))
    apart = median(one.requests for one in late) - median(one.requests for one in early)
    return {
        "early_bytes": before,
        "late_bytes": after,
        "grown_bytes": after - before,
        "bytes_per_1000": 1000 * (after - before) / apart if apart else 0.0,
        "peak_rss_bytes": max(one.rss_bytes for one in samples),
        "more_files": samples[-1].files - max(one.files for one in early),
        "more_threads": samples[-1].threads - max(one.threads for one in early),
        "first": asdict(samples[0]),
        "last": asdict(samples[-1]),
    }
