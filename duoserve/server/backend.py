"""The part of ``AsyncEngine`` that the server uses, as protocols, so that tests can replace it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from duoserve.interface import Objectives, Piece, ServiceFigures, ServiceState, Times
from duoserve.sampling import SamplingParams
from duoserve.text.tokenizer import Tokenizer


class Template(Protocol):
    """A checkpoint's chat template."""

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt that ``messages`` make.

        Raises RequestError for messages that make none, another DuoServeError if no messages could be rendered.
        """
        ...


class Model(Protocol):
    """The properties of a model; nothing here runs it."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None if the checkpoint has none."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens of the longest request, prompt and output."""
        ...

    @property
    def chat_template(self) -> Template | None: ...

    @property
    def policy(self) -> str: ...


class RequestStream(Protocol):
    """One request: its pieces, the last of which has a finish reason."""

    @property
    def objectives(self) -> Objectives:
        """The request's objectives, and the service's where it brought none."""
        ...

    @property
    def times(self) -> Times: ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Piece:
        """The next piece. Raises CopyError or another DuoServeError if the request failed, ClosedError if the service
        has ended.
        """
        ...

    def cancel(self) -> None:
        """Ends the request; may be called at any time, any number of times."""
        ...


class Service(Protocol):
    """A model at work for many callers."""

    @property
    def state(self) -> ServiceState: ...

    @property
    def model(self) -> Model: ...

    @property
    def capacity(self) -> int:
        """The most requests that may run and wait at once."""
        ...

    @property
    def objectives(self) -> Objectives:
        """The objectives of requests that bring none of their own."""
        ...

    async def submit(  # noqa: PLR0913
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        objectives: Objectives | None = None,
        *,
        logprobs: int | None = None,
        goes_on: bool = False,
        arrived: float | None = None,
    ) -> RequestStream:
        """Queues a prompt. The answer to a text is to be put behind it; that of token ids is with ``goes_on``.

        ``arrived`` is when the request came, in seconds of ``time.monotonic``; None: now.

        Raises RequestError if it can never be served, OverloadedError if not now, ClosedError if no longer.
        """
        ...

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and after ``seconds`` ends those that have not finished with ClosedError."""
        ...

    async def close(self) -> None: ...

    def figures(self) -> ServiceFigures: ...
