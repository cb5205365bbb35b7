"""A machine's rates, in a few seconds: bytes/s and FLOP/s of the calls that a model makes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.experts.rows import aligned_rows
from duoserve.link import seconds_on_gpu
from duoserve.moe_model import MoEModel

RATES = ("link", "memory", "flops", "disk", "copy_latency_s", "layer_overhead_s")
PIECE, PIECES, READERS = 4 << 20, 16, 2  # reads of the size of an expert, by as many threads as copy by default
ROUNDS = 3
WIDTH, ROWS, MATRICES = 2048, 128, 24  # 24 matrices of 8 MiB: more than caches hold
GPU_WIDTH, GPU_BYTES = 8192, 256 << 20


def measure(device: torch.device, folder: Path) -> dict[str, float]:
    """The RATES; ``folder`` is where packs lie, so its disk is the one that counts."""
    rates = _cpu_rates() if device.type == "cpu" else _gpu_rates(device)
    disk, latency_s = disk_rates(folder)
    rates |= {"disk": disk, "copy_latency_s": latency_s if device.type == "cpu" else 1e-5}
    return rates | {"layer_overhead_s": layer_overhead_s(rates["memory"])}


def best_seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The fastest of ``rounds`` after one that warms up."""
    return min([_seconds(run) for _ in range(rounds + 1)][1:])


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes/s of reads past the page cache, and the seconds of the shortest one."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch, _direct(_written(Path(scratch) / "pieces")) as descriptor:
        rows_RB = aligned_rows(READERS, PIECE)

        def all_pieces() -> None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # where reads cannot pass the page cache by
            list(readers.map(share, range(READERS)))

        def share(reader: int) -> None:
            buffer = rows_RB[reader].numpy().data
            for piece in range(reader, PIECES, READERS):
                os.preadv(descriptor, [buffer], piece * PIECE)

        with ThreadPoolExecutor(READERS) as readers:
            seconds = best_seconds(all_pieces)
        short = rows_RB[0, :4096].numpy().data
        return PIECES * PIECE / seconds, best_seconds(lambda: os.preadv(descriptor, [short], PIECE))


def layer_overhead_s(memory: float) -> float:
    """What a layer of bard's decode step takes, all experts in slots, beyond reading its weights."""
    with MoEModel.from_pretrained("bard", expert_slots="100%", policy="resident") as model:
        model.generate([1, 2, 3], max_tokens=4)
        model.generate([1, 2, 3], max_tokens=24)
        seconds, plan, config = min(model.stats.itl_s), model.memory, model.config
    active = plan.dense_bytes + plan.slot_bytes * config.top_k * len(config.moe_layers)
    return max(1e-6, (seconds - active / memory) / config.num_layers)


def _cpu_rates() -> dict[str, float]:
    weights = [torch.full((WIDTH, WIDTH), 0.01, dtype=torch.bfloat16) for _ in range(MATRICES)]
    one, many = torch.ones(1, WIDTH, dtype=torch.bfloat16), torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)

    def all_of(x_TK: Tensor, matrices: list[Tensor]) -> Callable[[], object]:
        return lambda: [kernels.linear(x_TK, w_NK) for w_NK in matrices]

    nbytes = sum(w_NK.nbytes for w_NK in weights)
    source, target = aligned_rows(2, nbytes)
    return {
        "memory": nbytes / best_seconds(all_of(one, weights)),
        "flops": 2 * ROWS * 4 * WIDTH**2 / best_seconds(all_of(many, weights[:4])),
        "link": nbytes / best_seconds(lambda: target.copy_(source)),
    }


def _gpu_rates(device: torch.device) -> dict[str, float]:
    pinned = torch.empty(GPU_BYTES, dtype=torch.uint8, pin_memory=True)
    target, source = (torch.empty(GPU_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    wide = torch.ones(GPU_WIDTH, GPU_WIDTH, dtype=torch.bfloat16, device=device)

    return {
        "memory": 2 * GPU_BYTES / seconds_on_gpu(lambda: target.copy_(source)),
        "flops": 2 * GPU_WIDTH**3 / seconds_on_gpu(lambda: wide @ wide),
        "link": GPU_BYTES / seconds_on_gpu(lambda: target.copy_(pinned, non_blocking=True)),
    }


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _written(path: Path) -> Path:
    with path.open("wb") as file:
        for piece in range(PIECES):
            file.write(bytes([piece]) * PIECE)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextmanager
def _direct(path: Path) -> Iterator[int]:
    """A descriptor that reads past the page cache, where there is such a thing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
