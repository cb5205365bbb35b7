"""Requests to an OpenAI-compatible server, all on their way at once, and what came back when."""

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
SHOWN = 300  # characters of an error
TEXTS = ("content", "reasoning", "reasoning_content")  # of a chat's chunk: what is said, and thoughts in both spellings


@dataclass(frozen=True)
class Target:
    """A server under ``url`` (with or without ``/v1``); ``model`` None: the first that it has.

    ``chat`` asks for chats instead of completions; ``ignore_eos``, which vLLM knows too, for full lengths. A request
    that is not answered to its end after ``timeout_s`` has failed.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    timeout_s: float = 600.0
    chat: bool = False
    ignore_eos: bool = False

    def client(self) -> httpx.AsyncClient:
        """A client for any number of requests at once; the caller closes it. ConfigError for what is no URL or no key.

        It takes no proxy from the environment: what is measured is the server.
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


@dataclass(frozen=True)
class Form:
    """How requests are put: to which endpoint, for which model, and whether answers must have their full length.

    An answer may take ``timeout_s`` from when it is asked for to its end, whatever comes meanwhile.
    """

    model: str
    chat: bool = False
    ignore_eos: bool = False
    timeout_s: float = 600.0

    @property
    def path(self) -> str:
        """Path of the endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, asked: LoadRequest) -> dict[str, Any]:
        """Body of a streamed request whose tokens the server counts."""
        said = {"messages": [{"role": "user", "content": asked.prompt}]} if self.chat else {"prompt": asked.prompt}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        longer = {"ignore_eos": True} if self.ignore_eos else {}
        return {"model": self.model, "max_tokens": asked.max_tokens, **said, **options, **longer}


async def answers(
    client: httpx.AsyncClient, form: Form, asked: Sequence[LoadRequest], times: Sequence[float]
) -> list[Answer]:
    """Asks each at its time (seconds from now), whatever has become of the others."""
    began = time.perf_counter()
    tasks = [_answer_at(client, form, each, at, began) for each, at in zip(asked, times, strict=True)]
    return await asyncio.gather(*tasks)


async def _answer_at(client: httpx.AsyncClient, form: Form, asked: LoadRequest, at: float, began: float) -> Answer:
    """What comes of it, by the time at which it was due: where this process is late, that is part of the latency."""
    await asyncio.sleep(at - (time.perf_counter() - began))
    late_s = time.perf_counter() - began - at
    try:
        async with asyncio.timeout(form.timeout_s):
            pieces, tokens = await _read(client, form, asked, began)
    except TimeoutError:
        return Answer(at, error=f"not answered to its end within {form.timeout_s:g} s", late_s=late_s)
    except _Failed as failure:
        return Answer(at, error=str(failure)[:SHOWN], late_s=late_s)
    except (httpx.HTTPError, ValueError) as error:
        return Answer(at, error=f"{type(error).__name__}: {error}"[:SHOWN], late_s=late_s)
    if not pieces:
        return Answer(at, error="no token came", late_s=late_s)
    return Answer(at, tuple(pieces), tokens or len(pieces), late_s=late_s)


class _Failed(Exception):
    """The server says that it has failed."""


async def _read(client: httpx.AsyncClient, form: Form, asked: LoadRequest, began: float) -> tuple[list[float], int]:
    """When each piece of the answer came, and how many tokens the server counted; 0 where it counts none.

    ValueError for what is no answer of OpenAI's.
    """
    pieces: list[float] = []
    tokens = 0
    async with client.stream("POST", form.path, json=form.body(asked)) as reply:
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
    """Whether an event brings a token, and how many it counts, 0 without; ValueError for what is not OpenAI's."""
    event = json.loads(data)
    try:
        if event.get("error") is not None:
            raise _Failed(str(event["error"]))
        return any(map(_has_token, event.get("choices") or ())), _counted(event)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"an event is not OpenAI's: {data}") from error


def _has_token(choice: dict[str, Any]) -> bool:
    """Whether a chunk, in either form, brings what the server counts: text, thoughts, or a token that has no text.

    A chat's first chunk says whose turn it is, and comes ahead of any token.
    """
    delta = choice.get("delta") or {}
    if "text" in choice or any(delta.get(name) for name in TEXTS):
        return True
    return delta.get("content") == "" and not delta.get("role")


def _counted(event: dict[str, Any]) -> int:
    """Tokens of the answer, where the server says so."""
    return int((event.get("usage") or {}).get("completion_tokens") or 0)
