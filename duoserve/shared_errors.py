"""Errors that are told to other callers than the one whose call raised them: without tracebacks, a copy for each."""

from __future__ import annotations

import copy
import traceback

from duoserve.errors import DuoServeError


def drop_tracebacks(error: BaseException) -> None:
    """Drops the tracebacks of ``error`` and its causes, before it is handed to another caller.

    A traceback's frames hold tensors and the engine; whoever keeps the error keeps them alive, so they are cleared.
    Call this before anyone is told: clearing the frame of a coroutine that waits again would end it.
    """
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)  # a log may keep the traceback itself
        at.__traceback__ = None
        at = at.__cause__


def own_copy(error: DuoServeError) -> DuoServeError:
    """A copy of ``error`` for one of several callers: each raises its own, so that no two share a traceback.

    The copies share their cause, so call ``drop_tracebacks`` before the first is handed out.
    """
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin
