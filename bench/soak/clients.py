"""The clients of a soak: each asks for one thing at a time, and holds what comes against what is expected."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from soak.load import JSON, Asked, Kind, wrong

DATA, DONE = "data: ", "data: [DONE]"
KEPT_FAULTS = 20


@dataclass
class Tally:
    """What became of all requests so far. ``tokens`` are those that clients were told of."""

    ended: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    choices: int = 0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; of seconds, some percentiles."""
        ranked = {name: spread(getattr(self, name)) for name in ("ttft_s", "whole_s")}
        return vars(self) | {"ended": dict(self.ended)} | ranked

    def fault(self, text: str) -> None:
        """Something that must not be."""
        self.num_faults += 1
        if len(self.faults) < KEPT_FAULTS:
            self.faults.append(text[:400])


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles by nearest rank; none of nothing."""
    ranked = sorted(seconds)
    return {f"p{percent}": ranked[round(percent / 100 * (len(ranked) - 1))] for percent in (50, 95, 99) if ranked}


class Clients:
    """``expected`` has, for each kind, the text and finish reason of each of its choices.

    ``one_has_ended`` is called whenever a request has ended as it should, once the tally knows.
    """

    def __init__(
        self, http: httpx.AsyncClient, kinds: Sequence[Kind], expected: Sequence[list[tuple[str, str]]], seed: int
    ) -> None:
        self.tally = Tally()
        self._http = http
        self._kinds = kinds
        self._expected = expected
        self._dice = random.Random(seed + 2)
        self.one_has_ended: Callable[[], None] = lambda: None

    async def work(self, asked: Iterable[Asked]) -> None:
        """One client: takes the next of ``asked``, which clients share, until there is none."""
        for one in asked:
            try:
                await getattr(self, f"_{one.fate}")(one)
                self.tally.ended[one.fate] += 1
                self.one_has_ended()
            except (httpx.HTTPError, ValueError, LookupError) as error:
                self.tally.fault(f"{one.fate} {one.kind}: {type(error).__name__}: {error}")

    async def _whole(self, one: Asked) -> None:
        began = time.perf_counter()
        answer = await self._http.post("/v1/completions", json=self._body(one))
        if answer.status_code != 200:
            self.tally.fault(f"{answer.status_code}: {answer.text}")
            return
        self.tally.whole_s.append(time.perf_counter() - began)
        found = answer.json()
        self._compare(one, {each["index"]: (each["text"], each["finish_reason"]) for each in found["choices"]})
        self.tally.tokens += found["usage"]["completion_tokens"]

    async def _streamed(self, one: Asked) -> None:
        began, first, tokens = time.perf_counter(), None, 0
        pieces, ends = dict[int, str](), dict[int, str]()
        async for event in self._events(one):
            first = first or time.perf_counter()
            for choice in event["choices"]:
                index = choice["index"]
                pieces[index] = pieces.get(index, "") + choice["text"]
                if choice["finish_reason"] is not None:
                    ends[index] = choice["finish_reason"]
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if first is not None:
            self.tally.ttft_s.append(first - began)
        self.tally.tokens += tokens
        self._compare(one, {index: (text, ends.get(index, "none")) for index, text in pieces.items()})

    async def _cancelled(self, one: Asked) -> None:
        """Half of them hang up in mid-stream, the others before there is an answer."""
        if one.kind % 2:
            events = self._events(one, longer=True)
            for _ in range(one.patience + 1):
                await anext(events, None)
            await events.aclose()  # which closes the connection
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(0.02 + 0.1 * one.patience):
                await self._http.post("/v1/completions", json=self._body(one) | {"max_tokens": 400})

    async def _malformed(self, one: Asked) -> None:
        bad = wrong(self._dice)
        kind = {"Content-Type": bad.content_type}
        answer = await self._http.request(bad.method, bad.path, content=bad.body, headers=kind)
        if answer.status_code != bad.says:
            self.tally.fault(f"{answer.status_code}, not {bad.says}, for {bad.path} {bad.body[:80]!r}")
        elif not answer.json()["error"]["message"]:
            self.tally.fault(f"an error without a message for {bad.body[:80]!r}")

    async def _events(self, one: Asked, longer: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream; a fault where it is cut short or has an error."""
        body = self._body(one) | {"stream": True, "stream_options": {"include_usage": True}}
        body |= {"max_tokens": 400} if longer else {}
        last = ""
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                self.tally.fault(f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')}")
                return
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith(DATA) and line != DONE:
                    event = json.loads(line.removeprefix(DATA))
                    if "error" in event:
                        self.tally.fault(f"in a stream: {event['error']}")
                        return
                    yield event
        if last != DONE:
            self.tally.fault(f"a stream ended with {last!r}")

    def _body(self, one: Asked) -> dict[str, Any]:
        return self._kinds[one.kind].body() | one.extras

    def _compare(self, one: Asked, found: dict[int, tuple[str, str]]) -> None:
        expected = dict(enumerate(self._expected[one.kind]))
        self.tally.choices += len(expected)
        if found != expected:
            self.tally.fault(f"kind {one.kind}: {found} but alone {expected}")


async def soak(clients: Clients, asked: Sequence[Asked], at_once: int) -> None:
    """All requests, ``at_once`` at a time."""
    queue = iter(asked)
    await asyncio.gather(*(clients.work(queue) for _ in range(at_once)))


def http_client(url: str) -> httpx.AsyncClient:
    """For any number of connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=120, headers={"Accept": JSON})
