"""What a GPU is, and what it can do at most, measured in the same run as the kernels: the ceilings of every figure."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from gpu.timing import Queued, Replay, Timed, Work, times_us
from harness import Summary

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
EMPTY_STEPS = 64
LINK_PIECES = 16


def gpu_facts() -> dict[str, Any]:
    """Name, size and driver of the current device."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def measure_ceilings(link_piece_bytes: int, scale: int = 1) -> dict[str, Any]:
    """Rates per second, the best of the rounds: a ceiling is what undisturbed work reaches. ``scale`` shrinks sizes.

    Bytes of a copy count twice, as they are read and written; the link's count once, in pinned pieces.
    """
    nbytes, size = COPY_BYTES // scale, MATMUL_SIZE // scale
    return {
        "copy_bytes_per_s": 2 * nbytes / _best_seconds(Replay(_copies(nbytes))),
        "matmul_flop_per_s": 2 * size**3 / _best_seconds(Replay([_product(size)])),
        "link_bytes_per_s": link_piece_bytes / _best_seconds(Queued(_uploads(link_piece_bytes))),
        "empty_kernel_us": Summary.of(times_us({"": Replay([_empty_kernel()] * EMPTY_STEPS)})[""]).median,
    }


def _best_seconds(timed: Timed) -> float:
    return 1e-6 * min(times_us({"": timed})[""])


def _copies(nbytes: int) -> Sequence[Work]:
    buffers = torch.randint(0, 256, (4, nbytes), dtype=torch.uint8, device="cuda")
    return [lambda: buffers[1].copy_(buffers[0]), lambda: buffers[3].copy_(buffers[2])]


def _product(size: int) -> Work:
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _uploads(nbytes: int) -> Sequence[Work]:
    """Copies of different pinned pieces, as experts come."""
    on_host = torch.randint(0, 256, (LINK_PIECES, nbytes), dtype=torch.uint8).pin_memory()
    on_device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return [lambda piece=piece: on_device.copy_(piece, non_blocking=True) for piece in on_host]


def _empty_kernel() -> Work:
    one = torch.zeros(1, device="cuda")
    return lambda: one.add_(1)
