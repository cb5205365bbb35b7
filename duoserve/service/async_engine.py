"""``AsyncEngine``: one model for many callers of an asyncio program."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from duoserve.errors import ClosedError, RequestError
from duoserve.interface import MAX_LOGPROBS, Objectives, ServiceFigures, ServiceSettings, ServiceState
from duoserve.moe_model import MoEModel
from duoserve.number_checks import check_number, checked_integer
from duoserve.openmp import ending_team
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.service.stream import Stream
from duoserve.service.worker import Task, Worker
from duoserve.text.writer import Writer

DEFAULTS = ServiceSettings()


class AsyncEngine:
    """Runs one model for many callers of an asyncio program; the engine works on a thread of its own.

    Only the engine uses the model until ``close``, which closes the model too.
    """

    def __init__(self, model: MoEModel, *, settings: ServiceSettings = DEFAULTS) -> None:
        self._model = model
        self._settings = settings
        with ending_team(), model.lend() as runtime:
            self._tokenizer = runtime.tokenizer
            self._worker = Worker(runtime, settings)
        self._closing: Future[None] | None = None
        self._close_lock = threading.Lock()

    @property
    def state(self) -> ServiceState:
        """Whether requests are taken."""
        return self._worker.state

    @property
    def model(self) -> MoEModel:
        """The model that is served, for its config and memory; its own calls are refused."""
        return self._model

    @property
    def capacity(self) -> int:
        """The most requests that may run and wait at once."""
        return self._settings.max_batch + self._settings.max_waiting

    @property
    def objectives(self) -> Objectives:
        """The objectives of requests that bring none of their own."""
        return self._settings.objectives

    def figures(self) -> ServiceFigures:
        """The figures since the service's start, as of the last step. Any thread may ask; it costs little."""
        return self._worker.figures

    async def submit(  # noqa: PLR0913
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        objectives: Objectives | None = None,
        *,
        logprobs: int | None = None,
        goes_on: bool = False,
        arrived: float | None = None,
    ) -> Stream:
        """Queues a prompt and gives the stream of its answer, which ends when the caller lets go of the stream.

        ``logprobs`` (0 to 20; None: no log-probabilities) is how many of the likeliest tokens to report at each place.
        Where an objective is None, the service's holds. The answer to a text keeps the space before its first word, so
        that prompt + answer is a text. That of token ids, such as those of a chat, does so only with ``goes_on``.
        ``arrived`` is when the request came, in seconds of ``time.monotonic``; None: now.

        Raises RequestError for what can never be served, OverloadedError (which says when to try again) for what cannot
        be served now, ClosedError if the service takes no more requests.
        """
        now = time.monotonic()
        arrived = now if arrived is None else arrived
        if self.state is not ServiceState.READY:
            raise ClosedError("the service takes no more requests")
        _check_kinds(params, objectives)
        if logprobs is not None:
            logprobs = checked_integer(RequestError, "logprobs", logprobs, 0, MAX_LOGPROBS)
        check_number(RequestError, "arrived", arrived, 0, now)
        prompt_ids = await asyncio.to_thread(self._model.encode, prompt)
        request = Request(prompt_ids, params, num_logprobs=logprobs, arrived=arrived)
        request.objectives = (objectives or Objectives()).or_else(self.objectives)
        stream = Stream(request, self._worker.cancel)
        behind = prompt_ids if goes_on or isinstance(prompt, str) else ()
        watched = weakref.ref(stream, lambda _: self._worker.cancel(request))
        task = Task(Writer(self._tokenizer, params.stop, behind), watched)
        try:
            await asyncio.wrap_future(self._worker.submit(request, task))
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and after ``seconds`` ends those that have not finished with ClosedError."""
        self._worker.drain()
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._worker.drained)), seconds)
        except TimeoutError:
            await asyncio.wrap_future(self._worker.end_all())

    async def close(self) -> None:
        """Ends all requests with ClosedError, then the thread, then the model.

        Further calls, in any event loop, wait for the same end, which comes even if all calls are cancelled.
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
