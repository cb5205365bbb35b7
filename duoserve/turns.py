"""Whose turn it is: a model does one call at a time, and closing it waits for a step of that call, not for its end."""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from duoserve.errors import ClosedError, RequestError
from duoserve.loading.load import Runtime
from duoserve.request import Request

LOOK_AGAIN_S = 1.0  # waiting calls look again after this: an interrupt may keep the end of a turn from notifying them
Result = TypeVar("Result")


@dataclass(eq=False)
class Turn:
    """The turn of one call. ``thread`` is the id of the thread that took its last step: a stream may change hands."""

    thread: int


class Turns:
    """Gives ``runtime`` to one call at a time until ``close``, which releases it. Any thread."""

    def __init__(self, runtime: Runtime) -> None:
        self._open_runtime: Runtime | None = runtime
        # Entered directly, not through the condition: an interrupt in Condition.__exit__ would leave it locked.
        # Reentrant: a stream that is garbage collected while this thread has the lock ends its turn.
        self._lock = threading.RLock()
        self._turn_ends = threading.Condition(self._lock)  # also notified by close(), which need not end a turn
        self._computing = threading.RLock()  # held for one step at a time: a stream left unread does not block close()
        self._turn: Turn | None = None  # of the call that has it
        self._tokens: Generator[tuple[Request, int]] | None = None  # of the call that has the turn
        self._lent = False

    @property
    def runtime(self) -> Runtime:
        """The runtime, for work that needs no turn; raises ClosedError after ``close``."""
        if self._open_runtime is None:
            raise ClosedError("this model was closed; load it again with MoEModel.from_pretrained")
        return self._open_runtime

    @contextmanager
    def turn(self) -> Iterator[Runtime]:
        """Waits for a turn, which lasts for the block.

        Raises RequestError if this thread has one already or a service has the model, ClosedError after ``close``.
        """
        mine = Turn(threading.get_ident())
        if self._has_turn(mine.thread):
            gc.collect()  # a stream that nobody has any more ends its turn when it is freed, and may be part of a cycle
        if self._has_turn(mine.thread):
            raise RequestError("this thread's earlier stream is still open: exhaust it or call its close() first")
        try:
            with self._lock:
                while self._turn is not None and self._open_runtime is not None:
                    self._turn_ends.wait(LOOK_AGAIN_S)
                self._check_to_be_had()
                self._turn = mine
            yield self.runtime
        finally:
            if self._turn is mine:
                self._turn = None
            with self._lock:
                self._turn_ends.notify_all()

    @contextmanager
    def lend(self) -> Iterator[Runtime]:
        """A turn that is the last one unless the block raises; ``close`` waits for the block. Errors as in ``turn``."""
        with self.turn() as runtime, self._computing:
            self._check_to_be_had()
            yield runtime
            self._lent = True

    def step(self, compute: Callable[[], Result]) -> Result:
        """Calls ``compute`` and gives its result. ``close`` waits for it; raises ClosedError if the model is closed."""
        with self._computing:
            _ = self.runtime
            return compute()

    @contextmanager
    def tokens(self, requests: Sequence[Request]) -> Iterator[Iterator[tuple[Request, int]]]:
        """A turn in which the engine generates: the block is given each new token with its request."""
        with self.turn() as runtime:
            self._tokens = tokens = runtime.engine.generate(requests)
            del runtime  # so that close() can release it while the block lasts
            try:
                yield self._step_by_step(tokens)
            finally:
                with self._computing:
                    tokens.close()
                    self._tokens = None

    def close(self) -> None:
        """Releases the runtime, after the step that another thread or a service computes; a second call does nothing.

        Calls that wait for their turn raise ClosedError, and so does the call that has it at its next step.
        """
        with self._lock:
            runtime, self._open_runtime = self._open_runtime, None
            self._turn_ends.notify_all()
        if runtime is not None:
            with self._computing, closing(runtime):
                if self._tokens is not None and inspect.getgeneratorstate(self._tokens) != inspect.GEN_RUNNING:
                    self._tokens.close()  # a stream that is not read to its end would hold the engine

    def _has_turn(self, thread: int) -> bool:
        turn = self._turn
        return turn is not None and turn.thread == thread

    def _check_to_be_had(self) -> None:
        _ = self.runtime
        if self._lent:
            raise RequestError("a service runs this model: submit requests to it")

    def _step_by_step(self, tokens: Generator[tuple[Request, int]]) -> Iterator[tuple[Request, int]]:
        turn = self._turn
        assert turn is not None
        while (made := self.step(lambda: next(tokens, None))) is not None:
            yield made
            turn.thread = threading.get_ident()
