"""Keeps torch modes that the calling program has set for its thread away from our work.

Settings for the whole process are left alone and apply to us too: where torch.set_float32_matmul_precision allows
products in fewer bits, ours are computed in these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Autocast has a switch for each kind of device, and a model on a GPU computes some things on the host.
KINDS = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, ops compute in the dtypes of their operands, even within torch.autocast."""
    with ExitStack() as modes:
        for kind in KINDS:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def as_in_new_thread() -> Iterator[None]:
    """Inside, torch is as a new thread finds it: for tensors that other threads write to, or that have gradients.

    A tensor made in torch's inference mode cannot be written to outside of that mode. Autocast is off too.
    """
    with torch.inference_mode(False), without_autocast():
        yield


@contextmanager
def inference() -> Iterator[None]:
    """Torch's inference mode, without autocast: for passes and for all that is prepared for them."""
    with torch.inference_mode(), without_autocast():
        yield
