"""What the server needs of the engine: the part of ``AsyncEngine`` that it uses, so that tests can play it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from duoserve.interface import Objectives, Piece, ServiceFigures, State, Times
from duoserve.sampling import SamplingParams
from duoserve.text.tokenizer import Text


class Template(Protocol):
    """A checkpoint's chat template."""

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt that ``messages`` make. RequestError where they make none, DuoServeError where nobody's would."""
        ...


class Model(Protocol):
    """What a model says of itself. Nothing here runs it."""

    @property
    def text(self) -> Text | None:
        """Its tokenizer, None where the checkpoint has none."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens of the longest request, prompt and output."""
        ...

    @property
    def chat_template(self) -> Template | None: ...

    @property
    def policy(self) -> str: ...


class Stream(Protocol):
    """One request: its pieces, the last of which has a finish reason."""

    @property
    def objectives(self) -> Objectives:
        """Its own objectives, and the service's where it brought none."""
        ...

    @property
    def times(self) -> Times: ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Piece:
        """CopyError or another DuoServeError: the request failed. ClosedError: the service went away."""
        ...

    def cancel(self) -> None:
        """Ends it, at any time and any number of times."""
        ...


class Service(Protocol):
    """A model at work for many callers."""

    @property
    def state(self) -> State: ...

    @property
    def model(self) -> Model: ...

    @property
    def capacity(self) -> int:
        """Requests that may be there at once: those that run and those that wait."""
        ...

    @property
    def objectives(self) -> Objectives:
        """The objectives of requests that bring none of their own."""
        ...

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        objectives: Objectives | None = None,
        *,
        logprobs: int | None = None,
        goes_on: bool = False,
    ) -> Stream:
        """With ``goes_on`` the text is one to put behind the prompt's, else one of its own.

        RequestError: not to be served. OverloadedError: not now. ClosedError: no longer.
        """
        ...

    async def drain(self, seconds: float) -> None:
        """Takes nothing more, and ends with ClosedError what has not finished ``seconds`` later."""
        ...

    async def close(self) -> None: ...

    def figures(self) -> ServiceFigures: ...
