"""Measures a machine's rates in a few seconds: bytes/s and FLOP/s of the calls that a model makes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from duoserve import kernels
from duoserve.config import ModelConfig
from duoserve.experts.budget import MemoryPlan
from duoserve.experts.device import CPU, free_bytes
from duoserve.experts.host_cores import last_cache_bytes
from duoserve.experts.rows import aligned_rows
from duoserve.launching.link import seconds_on_gpu
from duoserve.moe_model import MoEModel

RATES = (
    *("link", "memory", "flops", "widening", "disk", "reader"),
    *("copy_latency_s", "layer_overhead_s", "expert_overhead_s"),
)
PIECE, PIECES, READERS = 4 << 20, 16, 2  # reads of about an expert's size, by as many threads as copy by default
ROUNDS = 5
PCIE_LATENCY_S = 1e-5  # of a copy; not measured but assumed
NO_WIDENING = 1e18
WIDTH, MATRICES = 1536, 24  # 24 matrices of 4.5 MiB at least, and more where caches hold more
FEW, MANY = 16, 128  # rows of two products, whose difference tells the time of rows from that of the weights
GPU_WIDTH, GPU_BYTES = 8192, 256 << 20


def measure(device: torch.device, folder: Path) -> dict[str, float]:
    """The RATES; ``folder`` is where packs lie, so its disk is the one that is measured."""
    on_cpu = device.type == "cpu"
    rates = (_cpu_rates() if on_cpu else _gpu_rates(device)) | disk_rates(folder)
    latency_s = copy_latency_s(rates["disk"], folder) if on_cpu else PCIE_LATENCY_S
    return rates | overheads(rates["memory"]) | {"copy_latency_s": latency_s}


def usual_seconds(run: Callable[[], object]) -> float:
    """The median of ROUNDS after a warm-up: the usual time here, with other programs running as usual."""
    return statistics.median([_seconds(run) for _ in range(ROUNDS + 1)][1:])


def disk_rates(folder: Path) -> dict[str, float]:
    """Bytes/s of reads that bypass the page cache, by all copy threads and by a single one."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch, _direct(_written(Path(scratch) / "pieces")) as descriptor:
        rows_RB, nbytes = aligned_rows(READERS, PIECE), PIECES * PIECE

        def share(reader: int, readers: int) -> None:
            for piece in range(reader, PIECES, readers):
                os.preadv(descriptor, [rows_RB[reader].numpy().data], piece * PIECE)

        def all_pieces(readers: int) -> None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # in case reads cannot bypass the page cache
            list(threads.map(share, range(readers), [readers] * readers))

        with ThreadPoolExecutor(READERS) as threads:
            disk, alone = (nbytes / usual_seconds(partial(all_pieces, n)) for n in (READERS, 1))
        return {"disk": max(disk, alone), "reader": alone}


def copy_latency_s(disk: float, folder: Path) -> float:
    """Seconds of a copy beyond reading its bytes, such as waking threads; from small experts, fetched on demand."""
    kept, fetched = (_decode_s("bard-fine", "resident", "100%"), _decode_s("bard-fine", "on-demand", "25%", folder))
    copies = fetched.config.top_k * len(fetched.config.moe_layers)
    return max(1e-9, (fetched.seconds - kept.seconds) / copies - fetched.memory.slot_bytes / disk)


def overheads(memory: float) -> dict[str, float]:
    """Seconds of a layer and of an expert in a decode step beyond reading their weights.

    They are told apart by two models whose tokens take different numbers of experts, with all experts in slots.
    """
    (few, some_s), (many, more_s) = (_layer_s(name, memory) for name in ("bard", "bard-fine"))
    expert_s = max(1e-9, (more_s - some_s) / (many - few))
    return {"layer_overhead_s": max(1e-9, some_s - few * expert_s), "expert_overhead_s": expert_s}


class _Decoded(NamedTuple):
    """Seconds of a decode step, with the memory plan and the config of the model."""

    seconds: float
    memory: MemoryPlan
    config: ModelConfig


def _decode_s(name: str, policy: str, slots: str, folder: Path | None = None) -> _Decoded:
    with MoEModel.from_pretrained(name, expert_slots=slots, policy=policy, cache_dir=folder) as model:
        model.generate([1, 2, 3], max_tokens=4, ignore_eos=True)
        model.generate([1, 2, 3], max_tokens=24, ignore_eos=True)
        return _Decoded(statistics.median(model.stats.itl_s), model.memory, model.config)


def _layer_s(name: str, memory: float) -> tuple[int, float]:
    """The experts that a token takes in a layer, and the seconds of the layer beyond reading."""
    seconds, plan, config = _decode_s(name, "resident", "100%")
    active = plan.dense_bytes + plan.slot_bytes * config.top_k * len(config.moe_layers)
    return config.top_k, (seconds - active / memory) / config.num_layers


def num_matrices() -> int:
    """The number of bfloat16 matrices that memory is measured by: they take twice what the caches hold.

    All that is allocated, three times these bytes, is a quarter of the free RAM at most, unless MATRICES are more.
    """
    nbytes = 2 * WIDTH**2
    return max(MATRICES, min(2 * last_cache_bytes(), free_bytes(CPU) // 12) // nbytes)


def _cpu_rates() -> dict[str, float]:
    weights = [torch.full((WIDTH, WIDTH), 0.01, dtype=torch.bfloat16) for _ in range(num_matrices())]
    nbytes = sum(w_NK.nbytes for w_NK in weights)

    def product_s(rows: int) -> float:
        x_TK = torch.ones(rows, WIDTH, dtype=torch.bfloat16)
        return usual_seconds(lambda: [kernels.linear(x_TK, w_NK) for w_NK in weights])

    few_s, many_s = product_s(FEW), product_s(MANY)
    row_s = (many_s - few_s) / (MANY - FEW)
    source, target = aligned_rows(2, nbytes)
    return {
        "memory": nbytes / product_s(1),
        "flops": 2 * len(weights) * WIDTH**2 / max(row_s, 1e-12),
        "widening": nbytes / max(few_s - FEW * row_s, 1e-9),
        "link": nbytes / usual_seconds(lambda: target.copy_(source)),
    }


def _gpu_rates(device: torch.device) -> dict[str, float]:
    pinned = torch.empty(GPU_BYTES, dtype=torch.uint8, pin_memory=True)
    target, source = (torch.empty(GPU_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    wide = torch.ones(GPU_WIDTH, GPU_WIDTH, dtype=torch.bfloat16, device=device)

    return {
        "widening": NO_WIDENING,
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
    """A descriptor whose reads bypass the page cache, if the file system supports that."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
