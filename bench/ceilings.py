"""What the machine can do at most, measured in the same run as the engines: disk, memory and matrix units.

N output features, K input features, T tokens.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from harness import serve
from machine import drop_from_page_cache

DISK_THREADS = (1, 2, 4)
REPEATS = 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The fastest of ``repeats`` runs after one that warms up: a ceiling is what undisturbed work reaches."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class Ceilings:
    """The probes, each with its own warm-up; rates are per second, bytes and FLOP counted plainly."""

    def close(self) -> None:
        """Nothing outlives the process."""

    def measure(
        self, file: str, piece_bytes: int, rows: int, shape_NK: tuple[int, int], scratch_bytes: int
    ) -> dict[str, Any]:
        """Every ceiling: reads of ``file`` in pieces, products of ``rows`` tokens with weights of ``shape_NK``."""
        disk, direct = disk_rates(Path(file), piece_bytes)
        return {
            "disk_bytes_per_s": disk,
            "disk_direct": direct,
            "disk_piece_bytes": piece_bytes,
            "memory_bytes_per_s": memory_rate(scratch_bytes),
            "matmul_rows": rows,
            "matmul_flop_per_s": {name: matmul_rate(rows, shape_NK, d) for name, d in DTYPES.items()},
            "gemv_bytes_per_s": {name: gemv_rate(shape_NK, d, scratch_bytes) for name, d in DTYPES.items()},
        }


def disk_rates(file: Path, piece_bytes: int) -> tuple[dict[str, float], bool]:
    """Bytes per second of cold reads of ``file`` in shuffled pieces by 1, 2 and 4 threads; whether they were direct.

    Direct where the file system has it; elsewhere buffered, with the page cache dropped before each pass.
    """
    pieces = file.stat().st_size // piece_bytes
    if not pieces:
        raise ValueError(f"{file} is smaller than one piece of {piece_bytes} bytes")
    offsets = [i * piece_bytes for i in range(pieces)]
    random.Random(0).shuffle(offsets)
    direct = _has_direct(file)
    descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        rates = {str(n): _disk_rate(file, descriptor, offsets, piece_bytes, n) for n in DISK_THREADS}
    finally:
        os.close(descriptor)
    return rates, direct


def _disk_rate(file: Path, descriptor: int, offsets: list[int], piece_bytes: int, threads: int) -> float:
    buffers = [mmap.mmap(-1, piece_bytes) for _ in range(threads)]

    def read_share(thread: int) -> None:
        for offset in itertools.islice(offsets, thread, None, threads):
            if os.preadv(descriptor, [buffers[thread]], offset) != piece_bytes:
                raise OSError(f"short read of {file} at {offset}")

    def one_pass() -> float:
        drop_from_page_cache([file])
        start = time.perf_counter()
        list(pool.map(read_share, range(threads)))
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        fastest = min(one_pass() for _ in range(REPEATS))
    return len(offsets) * piece_bytes / fastest


def _has_direct(file: Path) -> bool:
    """Whether a direct read works; some file systems open the file and then refuse to read it."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        return os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0) > 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


def memory_rate(scratch_bytes: int) -> float:
    """Bytes per second that a sum over ``scratch_bytes`` of float32 reads."""
    data = torch.ones(scratch_bytes // 4)
    return data.nbytes / best_seconds(data.sum)


def matmul_rate(rows: int, shape_NK: tuple[int, int], dtype: torch.dtype) -> float:
    """FLOP per second of a product of ``rows`` tokens with one weight matrix that stays in the caches."""
    out_features, in_features = shape_NK
    x_TK, w_NK = torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
    return 2 * rows * out_features * in_features / best_seconds(lambda: F.linear(x_TK, w_NK))


def gemv_rate(shape_NK: tuple[int, int], dtype: torch.dtype, scratch_bytes: int) -> float:
    """Weight bytes per second of one-token products over enough matrices that none is found in the caches."""
    out_features, in_features = shape_NK
    count = max(1, scratch_bytes // (out_features * in_features * dtype.itemsize))
    weights = torch.full((count, out_features, in_features), 0.01, dtype=dtype)
    x_TK = torch.ones(1, in_features, dtype=dtype)

    def one_pass() -> None:
        for w_NK in weights:
            F.linear(x_TK, w_NK)

    return weights.nbytes / best_seconds(one_pass)


if __name__ == "__main__":
    serve(Ceilings)
