"""From text to token ids, off the event loop and for a bounded time: rendering and tokenizing may take long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from duoserve.errors import RequestError
from duoserve.server.backend import Model
from duoserve.server.errors import ApiError, bad, unavailable

Result = TypeVar("Result")
THREADS = 4  # this many texts at once; others wait


class Preparing:
    """Threads that render and tokenize. They raise a 400 for a text that takes longer than ``seconds``.

    A text that no thread takes up within ``seconds`` is a 503, for that is not its own fault.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="duoserve-text")

    async def encode(self, model: Model, prompt: str | list[int]) -> list[int]:
        """The token ids of a completion's prompt."""
        if not isinstance(prompt, str):
            return prompt
        if model.tokenizer is None:
            raise bad("prompt", "the prompt is text, but this model has no tokenizer: give token ids")
        return await self._bounded("prompt", model.tokenizer.encode, prompt)

    async def render(self, model: Model, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The token ids of a conversation; the template has written the special tokens itself."""
        tokenizer, template = model.tokenizer, model.chat_template
        if template is None or tokenizer is None:
            lacks = "chat template" if template is None else "tokenizer"
            raise bad("messages", f"this model has no {lacks}: ask /v1/completions")
        return await self._bounded("messages", lambda: tokenizer.encode(template.render(messages), add_special=False))

    async def _bounded(self, param: str, work: Callable[..., Result], *args: Any) -> Result:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def run() -> Result:
            loop.call_soon_threadsafe(begun.set)
            return work(*args)

        done = loop.run_in_executor(self._threads, run)
        try:
            await self._taken_up(begun)
            async with asyncio.timeout(self._seconds):
                return await done
        except TimeoutError as error:
            raise bad(param, f"{param} took longer than {self._seconds:g} s to tokenize: shorten it") from error
        except RequestError as error:
            raise ApiError(400, str(error), param=param) from error
        finally:
            done.cancel()  # or a thread would take it up for nobody

    async def _taken_up(self, begun: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await begun.wait()
        except TimeoutError as error:
            raise unavailable("the server prepares too many other prompts: try again") from error
