"""``AsyncEngine``: one model for many callers of an asyncio program."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from duoserve.errors import ClosedError, RequestError
from duoserve.interface import MAX_LOGPROBS, Objectives, ServiceFigures, ServiceSettings, State
from duoserve.moe_model import MoEModel
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.service.stream import Stream
from duoserve.service.worker import Task, Worker
from duoserve.text.writer import Writer

DEFAULTS = ServiceSettings()


class AsyncEngine:
    """Runs one model for many callers of an asyncio program; the engine works on a thread of its own.

    The model is its alone until ``close``, which closes the model too.
    """

    def __init__(self, model: MoEModel, *, settings: ServiceSettings = DEFAULTS) -> None:
        self._model = model
        self._settings = settings
        with model.lend() as runtime:
            self._text = runtime.text
            self._worker = Worker(runtime, settings)
        self._closing: Future[None] | None = None
        self._close_lock = threading.Lock()

    @property
    def state(self) -> State:
        """Whether requests are taken."""
        return self._worker.state

    @property
    def model(self) -> MoEModel:
        """What is served, for its config and memory; calls of it are refused."""
        return self._model

    @property
    def capacity(self) -> int:
        """Requests that may be there at once: those that run and those that wait."""
        return self._settings.max_batch + self._settings.max_waiting

    @property
    def objectives(self) -> Objectives:
        """What holds where a request brings none of its own."""
        return self._settings.objectives

    def figures(self) -> ServiceFigures:
        """The service since its start, as of the last step. Any thread; cheap."""
        return self._worker.figures

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        objectives: Objectives | None = None,
        *,
        logprobs: int | None = None,
        goes_on: bool = False,
    ) -> Stream:
        """Queues a prompt. ``logprobs`` (0 to 20; None: none) is how many of the likeliest tokens to report a place.
        What ``objectives`` leave open is the service's.

        With ``goes_on`` the text keeps the space before its first word, so that it can be put behind the prompt's;
        without, it begins as a text of its own, where some tokenizers leave that space out.

        RequestError for what can never be served, OverloadedError (which says when to try again) for what cannot be
        now, ClosedError when the service takes no more.
        """
        arrived = time.monotonic()
        if self.state is not State.READY:
            raise ClosedError("the service takes no more requests")
        _check_kinds(params, objectives)
        _check_logprobs(logprobs)
        prompt_ids = await asyncio.to_thread(self._model.encode, prompt)
        request = Request(prompt_ids, params, num_logprobs=logprobs, arrived=arrived)
        request.objectives = (objectives or Objectives()).or_else(self.objectives)
        stream = Stream(request, self._worker.cancel)
        task = Task(Writer(self._text, params.stop, prompt_ids if goes_on else ()), stream)
        try:
            await asyncio.wrap_future(self._worker.submit(request, task))
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, lets those that there are finish for so long, then ends the rest with ClosedError."""
        self._worker.drain()
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._worker.drained)), seconds)
        except TimeoutError:
            await asyncio.wrap_future(self._worker.end_all())

    async def close(self) -> None:
        """Ends all requests with ClosedError, then the thread, then the model.

        Who calls it again, in any event loop, waits for the same end, which comes even if everybody who waits is
        cancelled.
        """
        with self._close_lock:
            if self._closing is None:
                self._closing = ThreadPoolExecutor(1, thread_name_prefix="duoserve-close").submit(self._end)
        await asyncio.shield(asyncio.wrap_future(self._closing))

    def _end(self) -> None:
        self._worker.stop()
        self._model.close()


def _check_kinds(params: object, objectives: object) -> None:
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params is {params!r}, but must be SamplingParams")
    if objectives is not None and not isinstance(objectives, Objectives):
        raise RequestError(f"objectives is {objectives!r}, but must be Objectives")


def _check_logprobs(logprobs: int | None) -> None:
    number = isinstance(logprobs, int) and not isinstance(logprobs, bool)
    if logprobs is not None and not (number and 0 <= logprobs <= MAX_LOGPROBS):
        raise RequestError(f"logprobs is {logprobs!r}, but must be an integer in 0..{MAX_LOGPROBS}")
