"""The teams of threads that OpenMP keeps: one for each thread that has run a parallel loop, as long as it lives."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SOFT = 1  # omp_pause_soft: only threads are given up, which come back when they are needed


@contextmanager
def ending_team() -> Iterator[None]:
    """Ends the calling thread's team on leaving; its next parallel loop starts a new one, in 0.1 ms.

    A second team makes more threads than cores. Then libgomp has all of them sleep at every barrier instead of spin,
    and steps take twice as long, compiled ones three times. Where torch has another OpenMP, nothing happens.
    """
    try:
        yield
    finally:
        with suppress(AttributeError):  # a function of OpenMP 5.0
            ctypes.CDLL(None).omp_pause_resource_all(SOFT)
