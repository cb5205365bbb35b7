"""Threads that a test has started: those of other tests may end at any time, so all there are is no measure."""

from __future__ import annotations

import threading
from collections.abc import Callable


def threads_since() -> Callable[[], int]:
    """Counts the threads that are alive and were not when this was called."""
    before = set(threading.enumerate())
    return lambda: len(set(threading.enumerate()) - before)
