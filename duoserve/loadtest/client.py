"""Requests to an OpenAI-compatible server, all on their way at once, and what came back when."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from duoserve.errors import ConfigError, RequestError
from duoserve.loadtest.figures import Answer
from duoserve.loadtest.workload import Asked

DATA, DONE = "data: ", "[DONE]"
SHOWN = 300  # characters of an error


@dataclass(frozen=True)
class Target:
    """A server under ``url`` (with or without ``/v1``); ``model`` None: the first that it has."""

    url: str
    model: str | None = None
    api_key: str | None = None
    timeout_s: float = 600.0

    def client(self) -> httpx.AsyncClient:
        """For any number of requests at once; the caller closes it."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        base = self.url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=base, headers=headers, timeout=self.timeout_s, limits=limits)


async def served_model(client: httpx.AsyncClient, wanted: str | None) -> str:
    """The name to ask for; ConfigError where nobody answers, a key is wrong, or there is no such model."""
    try:
        reply = await client.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"--url: no server answers at {client.base_url} ({type(error).__name__}: {error})") from error
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        raise ConfigError(f"--api-key: {client.base_url} refuses it (401)")
    try:
        names = [model["id"] for model in reply.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--url: {client.base_url}v1/models is not OpenAI's ({reply.status_code})") from error
    if not names or (wanted is not None and wanted not in names):
        raise ConfigError(f"--model: {client.base_url} serves {', '.join(names) or 'nothing'}, not {wanted}")
    return wanted or str(names[0])


async def answers(
    client: httpx.AsyncClient, model: str, asked: Sequence[Asked], times: Sequence[float]
) -> list[Answer]:
    """Asks each at its time (seconds from now); RequestError with the first error when all of them fail."""
    began = time.perf_counter()
    tasks = [_answer_at(client, model, each, at, began) for each, at in zip(asked, times, strict=True)]
    found = await asyncio.gather(*tasks)
    if found and all(answer.error for answer in found):
        raise RequestError(f"all {len(found)} requests failed; the first: {found[0].error}")
    return found


async def _answer_at(client: httpx.AsyncClient, model: str, asked: Asked, at: float, began: float) -> Answer:
    await asyncio.sleep(at - (time.perf_counter() - began))
    asked_s = time.perf_counter() - began
    body = {
        "model": model,
        "prompt": asked.prompt,
        "max_tokens": asked.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces: list[float] = []
    tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != httpx.codes.OK:
                text = (await reply.aread()).decode(errors="replace")
                return Answer(asked_s, error=f"{reply.status_code}: {text[:SHOWN]}")
            async for line in reply.aiter_lines():
                now = time.perf_counter() - began
                if not line.startswith(DATA) or line.endswith(DONE):
                    continue
                event = json.loads(line.removeprefix(DATA))
                if "error" in event:
                    return Answer(asked_s, error=str(event["error"])[:SHOWN])
                tokens = _counted(event) or tokens
                if any(choice.get("text") for choice in event.get("choices", ())):
                    pieces.append(now)
    except (httpx.HTTPError, ValueError) as error:
        return Answer(asked_s, error=f"{type(error).__name__}: {error}"[:SHOWN])
    if not pieces:
        return Answer(asked_s, error="no text came")
    return Answer(asked_s, tuple(pieces), tokens or len(pieces))


def _counted(event: dict[str, Any]) -> int:
    """Tokens of the answer, where the server says so."""
    return int((event.get("usage") or {}).get("completion_tokens", 0))
