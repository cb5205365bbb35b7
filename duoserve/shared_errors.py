"""An error that others are told of than the one whose call has raised it: without tracebacks, a copy for each."""

from __future__ import annotations

import copy
import traceback

from duoserve.errors import DuoServeError


def drop_tracebacks(error: BaseException) -> None:
    """Drops the tracebacks of ``error`` and its causes, before it is handed to another caller.

    Their frames, which are cleared, and those that had called them keep tensors, and the engine itself: whoever kept
    the error would keep these alive. Nobody may have been told before: a coroutine that had would end where it waits.
    """
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)  # which may have been written down: a log keeps it too
        at.__traceback__ = None
        at = at.__cause__


def own_copy(error: DuoServeError) -> DuoServeError:
    """``error`` again, for one of several who are told: each raises its own, whose traceback is nobody else's.

    Its cause is everybody's: tracebacks are dropped before the first is told.
    """
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin
