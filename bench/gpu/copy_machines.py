"""What copies: a GPU over its link, and the host within its memory, which shows that the bench works."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from duoserve.experts.rows import aligned_rows
from duoserve.kernels import HostRows, HostWork, page_gather
from duoserve.kernels.reference_copies import page_gather as gather_on_host
from gpu.copy_table import CopyMachine, Way
from gpu.timing import Queued, times_us

ROUNDS = 7
MAX_ROWS, MIN_ROWS = 64, 2
HOST_BYTES = 256 << 20  # of rows that a round goes through, so that no cache holds them all
NOISE_BYTES = (64 << 20) + 1  # that are drawn; odd, so that no two rows begin at the same byte of them

Step = Callable[[], object]


def _row_count(nbytes: int) -> int:
    return max(MIN_ROWS, min(MAX_ROWS, HOST_BYTES // nbytes))


@cache
def _noise(nbytes: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def fill_with_noise(rows_NB: Tensor) -> None:
    """Random bytes into contiguous rows; once ``NOISE_BYTES`` are drawn they are repeated, for a core draws slowly."""
    noise_B = _noise(NOISE_BYTES)
    for piece_B in rows_NB.view(-1).split(NOISE_BYTES):
        piece_B.copy_(noise_B[: len(piece_B)])


class GpuCopies(CopyMachine):
    """The current CUDA device. Pinned copies and kernels are timed by the device, pageable ones by the host's clock."""

    def seconds(self, way: Way, nbytes: int) -> list[float]:
        """As in CopyMachine."""
        pinned = way not in (Way.TO_DEVICE_PAGEABLE, Way.FROM_DEVICE_PAGEABLE)
        steps = self._steps(way, _host_rows(_row_count(nbytes), nbytes, pinned), nbytes)[0]
        if pinned:
            return [us * 1e-6 for us in times_us({"": Queued(steps)}, ROUNDS)[""]]
        return _by_the_clock(steps, torch.cuda.synchronize)

    def arrives(self, way: Way, nbytes: int) -> bool:
        """As in CopyMachine."""
        pinned = way not in (Way.TO_DEVICE_PAGEABLE, Way.FROM_DEVICE_PAGEABLE)
        host_NB = _host_rows(MIN_ROWS, nbytes, pinned)
        steps, device_NB = self._steps(way, host_NB, nbytes)
        fill_with_noise(device_NB if way in (Way.FROM_DEVICE, Way.FROM_DEVICE_PAGEABLE) else host_NB)
        for step in steps:
            step()
        torch.cuda.synchronize()
        return torch.equal(host_NB, device_NB.cpu())

    def _steps(self, way: Way, host_NB: Tensor, nbytes: int) -> tuple[Sequence[Step], Tensor]:
        device_NB = torch.zeros((len(host_NB), nbytes), dtype=torch.uint8, device="cuda")
        pairs = list(zip(host_NB, device_NB, strict=True))
        if way is Way.ZERO_COPY:
            source = HostRows.of(list(host_NB), "cuda")
            works = [HostWork.of([(row, row)], "cuda") for row in range(len(host_NB))]
            return [lambda work=work: page_gather(source, work, device_NB) for work in works], device_NB
        if way in (Way.TO_DEVICE, Way.TO_DEVICE_PAGEABLE):
            return [lambda h=h, d=d: d.copy_(h, non_blocking=True) for h, d in pairs], device_NB
        return [lambda h=h, d=d: h.copy_(d, non_blocking=True) for h, d in pairs], device_NB


class HostCopies(CopyMachine):
    """Copies from RAM to RAM by every way's name: figures of no link."""

    def seconds(self, way: Way, nbytes: int) -> list[float]:
        """As in CopyMachine."""
        source_NB, target_NB = aligned_rows(MIN_ROWS, nbytes), aligned_rows(MIN_ROWS, nbytes)
        return _by_the_clock(_host_steps(way, source_NB, target_NB), lambda: None)

    def arrives(self, way: Way, nbytes: int) -> bool:
        """As in CopyMachine."""
        source_NB, target_NB = aligned_rows(MIN_ROWS, nbytes), aligned_rows(MIN_ROWS, nbytes)
        fill_with_noise(source_NB)
        for step in _host_steps(way, source_NB, target_NB):
            step()
        return torch.equal(source_NB, target_NB)


def _host_steps(way: Way, source_NB: Tensor, target_NB: Tensor) -> list[Step]:
    if way is Way.ZERO_COPY:
        source = HostRows.of(list(source_NB), "cpu")
        works = [HostWork.of([(row, row)], "cpu") for row in range(len(source_NB))]
        return [lambda work=work: gather_on_host(source, work, target_NB) for work in works]
    return [lambda s=s, t=t: t.copy_(s) for s, t in zip(source_NB, target_NB, strict=True)]


def _host_rows(count: int, nbytes: int, pinned: bool) -> Tensor:
    rows_NB = torch.zeros((count, nbytes), dtype=torch.uint8, pin_memory=pinned)
    return rows_NB.fill_(1)  # pageable memory is there only once it was written to


def _by_the_clock(steps: Sequence[Step], finish: Step) -> list[float]:
    """Seconds a step, from a quiet device to a quiet device, after a round that does not count."""
    rounds = []
    for _ in range(ROUNDS + 1):
        finish()
        began = time.perf_counter()
        for step in steps:
            step()
        finish()
        rounds.append((time.perf_counter() - began) / len(steps))
    return rounds[1:]
