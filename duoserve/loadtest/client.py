"""Sends requests to an OpenAI-compatible server, many at once, and notes when each piece of an answer comes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from duoserve.errors import ConfigError
from duoserve.loadtest.events import event_data
from duoserve.loadtest.figures import Answer
from duoserve.loadtest.workload import LoadRequest

DONE = "[DONE]"
SHOWN = 300  # characters of an error message
TEXTS = ("content", "reasoning", "reasoning_content")  # texts of a chat's chunk: thoughts have either of two names


@dataclass(frozen=True)
class Target:
    """A server under ``url`` (with or without ``/v1``); ``model`` None: the first that it has, by ``served_model``.

    With ``chat``, chats are asked for instead of completions; with ``ignore_eos``, which vLLM takes too, answers of
    full length. A request that is not answered to its end after ``timeout_s``, whatever comes meanwhile, has failed.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    timeout_s: float = 600.0
    chat: bool = False
    ignore_eos: bool = False

    @property
    def path(self) -> str:
        """The path of the endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, asked: LoadRequest) -> dict[str, Any]:
        """The body of a streamed request, which asks the server to count tokens."""
        said = {"messages": [{"role": "user", "content": asked.prompt}]} if self.chat else {"prompt": asked.prompt}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        longer = {"ignore_eos": True} if self.ignore_eos else {}
        return {"model": self.model, "max_tokens": asked.max_tokens, **said, **options, **longer}

    def client(self) -> httpx.AsyncClient:
        """A client for any number of requests, which the caller closes. Raises ConfigError for a bad URL or key.

        It takes no proxy from the environment, so that the server itself is measured.
        """
        if self.api_key is not None and not self.api_key.isprintable():
            raise ConfigError("--api-key: no request can show a line break, a byte that is not UTF-8, and their like")
        headers = {} if self.api_key is None else {b"Authorization": f"Bearer {self.api_key}".encode()}
        base = self.url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        direct = httpx.AsyncHTTPTransport(limits=limits)
        try:
            return httpx.AsyncClient(base_url=base, headers=headers, timeout=self.timeout_s, transport=direct)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"--url: {self.url!r} is no URL ({error})") from error


async def served_model(client: httpx.AsyncClient, wanted: str | None) -> str:
    """The model's name in requests; raises ConfigError without an answer, with a wrong key, or without that model."""
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
    client: httpx.AsyncClient, target: Target, asked: Sequence[LoadRequest], times: Sequence[float]
) -> list[Answer]:
    """Sends each request at its time (seconds from now), however the others fare, and gives their answers."""
    began = time.perf_counter()
    tasks = [_answer_at(client, target, each, at, began) for each, at in zip(asked, times, strict=True)]
    return await asyncio.gather(*tasks)


async def _answer_at(client: httpx.AsyncClient, target: Target, asked: LoadRequest, at: float, began: float) -> Answer:
    """The answer to one request. Latencies count from when it was due, so they include a delay of this process."""
    await asyncio.sleep(at - (time.perf_counter() - began))
    late_s = time.perf_counter() - began - at
    try:
        async with asyncio.timeout(target.timeout_s):
            pieces, tokens = await _read(client, target, asked, began)
    except TimeoutError:
        return Answer(at, error=f"not answered to its end within {target.timeout_s:g} s", late_s=late_s)
    except _Failed as failure:
        return Answer(at, error=str(failure)[:SHOWN], late_s=late_s)
    except (httpx.HTTPError, ValueError) as error:
        return Answer(at, error=f"{type(error).__name__}: {error}"[:SHOWN], late_s=late_s)
    if not pieces:
        return Answer(at, error="no token came", late_s=late_s)
    return Answer(at, tuple(pieces), tokens or len(pieces), late_s=late_s)


class _Failed(Exception):
    """Raised if the server reports that it has failed."""


async def _read(client: httpx.AsyncClient, target: Target, asked: LoadRequest, began: float) -> tuple[list[float], int]:
    """When each piece of the answer came, and how many tokens the server counted (0 if it does not count).

    Raises ValueError if the answer is not in OpenAI's form.
    """
    pieces: list[float] = []
    tokens = 0
    async with client.stream("POST", target.path, json=target.body(asked)) as reply:
        if reply.status_code != httpx.codes.OK:
            raise _Failed(f"{reply.status_code}: {(await reply.aread()).decode(errors='replace')}")
        async for data in event_data(reply.aiter_bytes()):
            now = time.perf_counter() - began
            if data == DONE:
                continue
            has_token, counted = _understood(data)
            tokens = counted or tokens
            if has_token:
                pieces.append(now)
    return pieces, tokens


def _understood(data: str) -> tuple[bool, int]:
    """Whether an event brings a token, and how many tokens it counts, or 0. Raises ValueError as ``_read`` does."""
    event = json.loads(data)
    try:
        if event.get("error") is not None:
            raise _Failed(str(event["error"]))
        return any(map(_has_token, event.get("choices") or ())), _counted(event)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"an event is not OpenAI's: {data}") from error


def _has_token(choice: dict[str, Any]) -> bool:
    """Whether a chunk, in either form, brings what the server counts: text, thoughts, or a token without text.

    A chat's first chunk only names the role, and comes before any token.
    """
    delta = choice.get("delta") or {}
    if "text" in choice or any(delta.get(name) for name in TEXTS):
        return True
    return delta.get("content") == "" and not delta.get("role")


def _counted(event: dict[str, Any]) -> int:
    """Tokens of the answer if the server gives their number, else 0."""
    return int((event.get("usage") or {}).get("completion_tokens") or 0)
