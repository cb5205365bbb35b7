"""What a program around us has set for its thread in torch does not hold for our work.

What it has set for the whole process is left alone, and does: where torch.set_float32_matmul_precision allows products
in fewer bits, ours have these too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Autocast is a switch for each kind of device, and what a model on a GPU does not compute there, the host does.
KINDS = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, ops have the dtypes of their operands, whatever torch.autocast is around."""
    with ExitStack() as held:
        for kind in KINDS:
            if torch.is_autocast_enabled(kind):
                held.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def as_in_new_thread() -> Iterator[None]:
    """Inside, torch is as a new thread finds it: for tensors that other threads write to, or that have gradients.

    Those made in torch's inference mode can be written to by nobody who is not in it. Autocast is off too.
    """
    with torch.inference_mode(False), without_autocast():
        yield


@contextmanager
def inference() -> Iterator[None]:
    """Torch's inference mode, without autocast: for passes and all that is made ready for them."""
    with torch.inference_mode(), without_autocast():
        yield
