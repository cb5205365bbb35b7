"""Turns an allocator's refusal into an error of our own, which keeps nothing alive of what was being made."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from duoserve.errors import DuoServeError, MemoryBudgetError

# Only torch's own GPU allocator raises a type for this. The CPU's, the driver and cuBLAS only say it in a message.
WORDS = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def explained_refusals(doing: str) -> Iterator[None]:
    """Raises MemoryBudgetError if memory is refused inside. ``doing`` says what was done: "the model was loaded"."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        traceback.clear_frames(error.__traceback__)  # else a kept error keeps alive what was made so far
        raise MemoryBudgetError(
            f"out of memory while {doing} ({first_line(error)}): free some, or lower expert_slots, memory, host_memory "
            "or max_context"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of the message of an error that is not ours; its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_refusal(error: Exception) -> bool:
    """Whether ``error`` says that memory was refused; False for our own errors, which explain themselves."""
    if isinstance(error, DuoServeError):
        return False
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in WORDS)
