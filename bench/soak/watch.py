"""A process under observation: its memory, files and threads by the requests that it has served, and its health."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

EVERY_S = 0.25
PARTS = 20  # a look when each of them has ended: of a short run, seconds alone might leave a quarter out
WARM, LATE = 0.25, 0.75  # memory is compared between the quarter of requests behind the first, and the last
COMPARED = ("early_bytes", "late_bytes", "grown_bytes", "bytes_per_1000", "more_files", "more_threads")


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


def looking(process_id: int, asked: int, ended: Callable[[], int], samples: list[Sample]) -> Callable[[], None]:
    """What to call whenever one of ``asked`` requests has ended: takes a sample with every twentieth part of them."""
    every = max(1, asked // PARTS)

    def one_has_ended() -> None:
        if ended() % every == 0:
            samples.append(look(process_id, ended()))

    return one_has_ended


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
    """From the quarter of requests behind the first to the last: anonymous memory in medians, files and threads.

    None of these where nobody looked at the former: before it, a server that is well still grows.
    """
    last = samples[-1].requests
    early = [one for one in samples if WARM * last <= one.requests < 2 * WARM * last]
    late = [one for one in samples if one.requests >= LATE * last]
    always = {
        "peak_rss_bytes": max(one.rss_bytes for one in samples),
        "first": asdict(samples[0]),
        "last": asdict(samples[-1]),
    }
    if not early:
        return dict.fromkeys(COMPARED) | always
    before, after = (median(one.anonymous_bytes for one in part) for part in (early, late))
    apart = median(one.requests for one in late) - median(one.requests for one in early)
    compared = (
        before,
        after,
        after - before,
        1000 * (after - before) / apart if apart else 0.0,
        samples[-1].files - max(one.files for one in early),
        samples[-1].threads - max(one.threads for one in early),
    )
    return dict(zip(COMPARED, compared, strict=True)) | always
