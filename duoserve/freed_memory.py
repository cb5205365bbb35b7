"""Memory that the C library has been given back, and keeps for what is allocated next."""

from __future__ import annotations

import torch

# glibc raises its limits when it is given back a large piece, of up to 32 MiB: below that size it keeps what is freed,
# up to twice as much.
LARGE_BYTES = 31 << 20


def keep_freed_memory() -> None:
    """Has glibc keep up to 62 MiB of freed memory; of other C libraries nothing is asked.

    At first it keeps 128 KiB. Buffers of a pass would then be given back to the system and taken anew all the time, and
    the system clears each of their pages: half of the time of a prompt through int4 experts (bench/LOG.md).
    """
    torch.empty(LARGE_BYTES, dtype=torch.uint8, device="cpu")
