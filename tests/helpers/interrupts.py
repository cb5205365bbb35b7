"""A KeyboardInterrupt at a call of the test's choice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import CO_GENERATOR
from types import FrameType

Counts = Callable[[FrameType], bool]


class Interrupt:
    """Interrupts this thread at call number ``at`` of frames that count: going into Python, or back from what is not.

    ``seen`` counts those so far.
    """

    def __init__(self, at: int, counts: Counts) -> None:
        self.at, self.seen = at, 0
        self._counts = counts

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if (event == "c_return" or _enters(frame, event)) and self._counts(frame):
            self.seen += 1
            if self.seen == self.at:
                sys.setprofile(None)
                raise KeyboardInterrupt


def _enters(frame: FrameType, event: str) -> bool:
    """Not where a generator goes on: an error of this kind would come before what stands around its ``yield``."""
    return event == "call" and not frame.f_code.co_flags & CO_GENERATOR


@contextmanager
def interrupted(at: int, counts: Counts) -> Iterator[Interrupt]:
    """The block up to its call number ``at``, as in Interrupt; the whole of it where it has fewer."""
    interrupt = Interrupt(at, counts)
    sys.setprofile(interrupt)
    try:
        yield interrupt
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
