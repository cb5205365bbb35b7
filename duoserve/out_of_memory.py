"""What becomes of an allocator's refusal: an error in our words, which keeps nothing alive of what was being made."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from duoserve.errors import DuoServeError, MemoryBudgetError

# torch has a type for what its own allocator on a GPU refuses. The CPU's, the driver and cuBLAS only say so.
WORDS = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def explained_refusals(doing: str) -> Iterator[None]:
    """MemoryBudgetError where memory is refused inside: ``doing`` is what was done, as in "the model was loaded"."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        traceback.clear_frames(error.__traceback__)  # else who keeps the error keeps what was made so far
        raise MemoryBudgetError(
            f"out of memory while {doing} ({first_line(error)}): free some, or lower expert_slots, memory, host_memory "
            "or max_context"
        ) from error


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, in one line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_refusal(error: Exception) -> bool:
    """Whether ``error`` says that memory was refused; one in our words has said what there was to say."""
    if isinstance(error, DuoServeError):
        return False
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in WORDS)
