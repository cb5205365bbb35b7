"""The cores that this process may use: what they are, how much of their time, and what their caches hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path

import torch

from duoserve.callers import warn_caller
from duoserve.experts.control_groups import GROUPS, PROC, own_groups

SYSFS = Path("/sys")
CPU_FIELDS = ("model name", "cpu family", "model", "CPU implementer", "CPU part")  # of x86 and of ARM


def allowed_cores(proc: Path = PROC, groups: Path = GROUPS) -> float:
    """The cores whose time the control groups let this process have, which may be a fraction; inf without a limit."""
    return min(_limits(proc, groups), default=inf)


def usable_cores() -> float:
    """The cores that this process may run on, or fewer if it may not have so much time."""
    return min(len(os.sched_getaffinity(0)), allowed_cores())


def cpu_model(proc: Path = PROC) -> str:
    """What the first core says of its kind, such as "AMD EPYC, 25, 17"; empty where it says nothing."""
    with suppress(OSError):
        lines = (proc / "cpuinfo").read_text().partition("\n\n")[0].splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return ", ".join(fields[name] for name in CPU_FIELDS if name in fields)
    return ""


def last_cache_bytes(sysfs: Path = SYSFS) -> int:
    """Bytes of all last-level caches of the cores that this process may run on; 0 where nothing says so."""
    found: dict[str, int] = {}
    for core in os.sched_getaffinity(0):
        with suppress(OSError, ValueError):
            _, shared, nbytes = max(map(_cache, (sysfs / f"devices/system/cpu/cpu{core}/cache").glob("index*")))
            found[shared] = nbytes
    return sum(found.values())


def warn_of_excess_threads() -> None:
    """Warns if torch computes with more threads than may run.

    Once a group has had its time, the kernel stops all of its threads until the next period, and those that a thread
    of a loop waits for with them.
    """
    threads, cores = torch.get_num_threads(), allowed_cores()
    if threads > max(1, cores):
        fitting = max(1, int(cores))
        warn_caller(
            f"torch computes with {threads} threads, but a control group (as of a container) allows this process the "
            f"time of {cores:g} cores only, so that the threads are stopped again and again: call "
            f"torch.set_num_threads({fitting}) before a model is loaded, or set OMP_NUM_THREADS={fitting}"
        )


def _cache(folder: Path) -> tuple[int, str, int]:
    """Its level, the cores that share it, and its bytes."""
    level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
    return int(level), shared, int(size.removesuffix("K")) << 10


def _limits(proc: Path, groups: Path) -> Iterator[float]:
    for folder, version in own_groups("cpu", proc, groups):
        with suppress(OSError, ValueError):  # ValueError: the quota is "max", which is none
            quota_us, period_us = map(int, _quota(folder, version).split())
            if quota_us > 0:  # -1 is no limit
                yield quota_us / period_us


def _quota(folder: Path, version: int) -> str:
    """The microseconds of cores' time in each period, and those of the period."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version == 1 else ("cpu.max",)
    return "".join((folder / name).read_text() for name in names)
