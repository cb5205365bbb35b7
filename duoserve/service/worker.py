"""The thread that runs a service's engine. Between two steps it does what callers have asked for meanwhile."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from duoserve.engine import Engine
from duoserve.errors import ClosedError, DuoServeError, OverloadedError
from duoserve.interface import FinishReason, Piece, ServiceFigures, ServiceSettings, ServiceState
from duoserve.loading.load import Runtime
from duoserve.request import Produced, Request
from duoserve.service.stream import Stream
from duoserve.shared_errors import drop_tracebacks
from duoserve.text.writer import Writer

# Figures that take work to gather are renewed no more often than this while the engine is busy.
FIGURES_S = 0.25
log = logging.getLogger("duoserve")


@dataclass(frozen=True)
class Task:
    """The writer of a request's text, and the stream that its caller reads, which only the caller keeps alive."""

    writer: Writer
    stream: weakref.ref[Stream]

    def give(self, item: Piece | DuoServeError | None, finished: float | None) -> bool:
        """As the stream's own; gives False too if the caller has let go of it."""
        stream = self.stream()
        return stream is not None and stream.give(item, finished)


class Worker:
    """Runs ``runtime``'s engine on a thread of its own until ``stop``, which lets go of the runtime.

    Closing the runtime stops the worker first. All methods may be called by any thread.
    """

    def __init__(self, runtime: Runtime, settings: ServiceSettings) -> None:
        runtime.engine.serve_by(settings)
        self._open_runtime: Runtime | None = runtime
        self._tasks: dict[Request, Task] = {}
        self._finished: Counter[FinishReason] = Counter()
        self._refused = self._attained = self._with_objectives = 0
        self._state = ServiceState.READY
        self._why = "the service is shutting down"
        self._asked: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopped = self._gone = False
        self.drained: Future[None] = Future()
        self._stats = runtime.meter.snapshot()
        self._stats_at = 0.0
        self._publish(fresh=True)
        self._thread = threading.Thread(target=self._run, name="duoserve-engine", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # an interpreter that ends kills its other threads, which aborts inside torch
        runtime.before_close(self.stop)

    @property
    def figures(self) -> ServiceFigures:
        """The figures as of the last step."""
        return self._figures

    @property
    def state(self) -> ServiceState:
        """Whether requests are taken."""
        return self._state

    def submit(self, request: Request, task: Task) -> Future[None]:
        """Adds a request; the future has the error if it is refused."""
        answer: Future[None] = Future()
        self._ask(lambda: self._add(request, task, answer))
        return answer

    def cancel(self, request: Request) -> None:
        """Ends a request; its stream ends without an error."""
        self._ask(lambda: self._end(request, None, "abort"))

    def drain(self) -> None:
        """Takes no more requests; ``drained`` is done when the last has ended."""
        self._ask(lambda: self._become(ServiceState.DRAINING))

    def end_all(self) -> Future[None]:
        """Takes no more requests, and ends all present ones with ClosedError."""
        done: Future[None] = Future()
        self._ask(lambda: self._end_all(done))
        return done

    def stop(self) -> None:
        """Ends all requests and the thread; idempotent. The figures stay as they were at the end."""
        self.end_all()
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        self._open_runtime = None  # streams refer to the worker, and may be kept when the model is closed

    @property
    def _runtime(self) -> Runtime:
        """The runtime, which only the worker's thread may use; raises ClosedError after ``stop``."""
        if self._open_runtime is None:
            raise ClosedError("the service has been closed")
        return self._open_runtime

    @property
    def _engine(self) -> Engine:
        return self._runtime.engine

    def _ask(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._gone:
                self._asked.append(command)
                self._wake.notify()
                return
        command()  # the worker's thread has ended, so nothing else uses the engine

    def _run(self) -> None:
        try:
            self._runtime.meter.begin_request()
            while self._obey():
                made = self._engine.step()
                self._publish(fresh=False)  # before tokens are delivered: their callers may look at the figures at once
                for produced in made:
                    self._deliver(produced)
        except BaseException as error:  # of any kind: otherwise all callers would wait for ever
            self._die(error)
        with self._wake:
            left, self._asked, self._gone = self._asked, deque(), True
        for command in left:
            command()
        atexit.unregister(self.stop)

    def _obey(self) -> bool:
        """Does what was asked for, and waits while there is no work; gives False when it is time to stop."""
        while True:
            self._settle()
            with self._wake:
                while self._engine.idle and not self._asked and not self._stopped:
                    self._wake.wait()
                stopped = self._stopped and not self._asked
            for _ in range(len(self._asked)):  # if one raises, those behind it are done when the thread ends
                self._asked.popleft()()
            if stopped or not self._engine.idle:
                return not stopped

    def _settle(self) -> None:
        if not self._engine.idle:
            return
        self._publish(fresh=True)
        if self._state is ServiceState.DRAINING and not self.drained.done():
            self.drained.set_result(None)

    def _add(self, request: Request, task: Task, answer: Future[None]) -> None:
        if self._state is not ServiceState.READY:
            _answer(answer, ClosedError(self._why))
            return
        try:
            self._engine.add(request)
        except DuoServeError as error:
            self._refused += isinstance(error, OverloadedError)
            self._publish(fresh=False)
            _answer(answer, error)
            return
        except BaseException:
            _answer(answer, ClosedError("the service has died of an error"))
            raise
        self._tasks[request] = task
        self._publish(fresh=False)
        _answer(answer, None)

    def _deliver(self, produced: Produced) -> None:
        request = produced.request
        task = self._tasks.get(request)
        if task is None:
            return
        if produced.token is None:
            self._end(request, produced.error, "error")
            return
        self._runtime.meter.outputs(1)
        try:
            text = _text(task.writer, request, produced.token)
        except DuoServeError as error:
            drop_tracebacks(error)
            self._end(request, error, "error")
            return
        logprobs = () if produced.logprobs is None else (produced.logprobs,)
        piece = Piece(text, (produced.token,), logprobs, request.finish_reason)
        if request.finish_reason is not None:
            self._end(request, piece, request.finish_reason)
        elif not task.give(piece, None):
            self._end(request, None, "abort")

    def _end(self, request: Request, last: Piece | DuoServeError | None, reason: FinishReason) -> None:
        """Ends a request and its stream; does nothing if they have ended before."""
        task = self._tasks.pop(request, None)
        if task is None:
            return
        self._engine.abort(request)
        self._finished[reason] += 1
        self._judge(request, reason)
        self._publish(fresh=self._engine.idle)
        task.give(last, time.monotonic())

    def _judge(self, request: Request, reason: FinishReason) -> None:
        goals = request.objectives
        if reason == "abort" or (goals.ttft_s is None and goals.tpot_s is None):
            return
        self._with_objectives += 1
        self._attained += reason != "error" and request.attained

    def _end_all(self, done: Future[None]) -> None:
        self._become(ServiceState.DRAINING)
        for request in list(self._tasks):
            self._end(request, ClosedError(self._why), "error")
        _answer(done, None)

    def _become(self, state: ServiceState) -> None:
        if self._state is not ServiceState.DEAD:
            self._state = state

    def _die(self, error: BaseException) -> None:
        log.critical("the service has died of an error", exc_info=error)
        drop_tracebacks(error)  # once, and before any caller is told: they may raise it again
        self._state = ServiceState.DEAD
        self._why = f"the service has died of an error: {type(error).__name__}: {error}"
        tasks, self._tasks = self._tasks, {}
        self._finished["error"] += len(tasks)
        self._figures = self._now(running=0, waiting=0)
        for request, task in tasks.items():
            request.finish("error")
            dead = ClosedError(self._why)
            dead.__cause__ = error
            task.give(dead, time.monotonic())
        if not self.drained.done():
            self.drained.set_result(None)

    def _publish(self, fresh: bool) -> None:
        now = time.monotonic()
        if fresh or now - self._stats_at >= FIGURES_S:
            self._stats, self._stats_at = self._runtime.meter.snapshot(), now
        self._figures = self._now(self._engine.num_started, self._engine.num_waiting)

    def _now(self, running: int, waiting: int) -> ServiceFigures:
        return ServiceFigures(
            state=self._state,
            running=running,
            waiting=waiting,
            kv_usage=self._engine.kv_usage,
            stats=self._stats,
            finished=dict(self._finished),
            refused=self._refused,
            attained=self._attained,
            with_objectives=self._with_objectives,
            sent_back=self._engine.num_sent_back,
        )


def _text(writer: Writer, request: Request, token: int) -> str:
    """The text that became certain with ``token``, or all the rest if it is the last. Raises the tokenizer's errors."""
    text = writer.push(request, token)
    return text if request.finish_reason is None else text + writer.rest(request)


def _answer(answer: Future[None], error: DuoServeError | None) -> None:
    """Sets the future's result or error, unless its caller has cancelled it."""
    if error is not None:
        drop_tracebacks(error)
    if answer.set_running_or_notify_cancel():
        answer.set_result(None) if error is None else answer.set_exception(error)
