"""Facts of the machine and the versions that a figure ships with, and the counters of a process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")


def conditions(bench: str, quick: bool, folder: Path | None = None) -> dict[str, Any]:
    """What every result file begins with; the disk is that of ``folder``, or of the benches where that is None."""
    return {
        "bench": bench,
        "quick": quick,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine_facts(folder or Path(__file__).resolve().parent),
        "versions": versions(),
        "gpu": None,
        "seconds": 0.0,
    }


def machine_facts(folder: Path) -> dict[str, Any]:
    """CPU, memory, and the disk that holds ``folder``."""
    cpu = _fields(Path("/proc/cpuinfo"))
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "ram_bytes": int(_fields(Path("/proc/meminfo"))["MemTotal"].split()[0]) * 1024,
        "kernel": platform.release(),
        "disk": _disk_facts(folder),
    }


def _disk_facts(folder: Path) -> dict[str, Any]:
    """The mount under ``folder`` and its read-ahead, which decides what a page fault of a mapped file reads."""
    target = folder.resolve()
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    source, point, kind = max((m[:3] for m in mounts if target.is_relative_to(m[1])), key=lambda m: len(m[1]))
    device = target.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    ahead = next((p for b in (block, block.parent) if (p := b / "queue/read_ahead_kb").exists()), None)
    return {
        "source": source,
        "mount": point,
        "filesystem": kind,
        "read_ahead_kib": int(ahead.read_text()) if ahead else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of what is measured, None where it is not installed, and the commit of this repository."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "transformers", "accelerate", "xllamacpp", "safetensors", "duoserve"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"commit": _commit()}


def _commit() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "duoserve", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        said = os.environ.get("DUOSERVE_COMMIT")  # a copy of the tree may travel without its history
        return said and f"{said} as DUOSERVE_COMMIT says"
    return commit + (" with uncommitted changes" if changed else "")


def disk_bytes_read() -> int:
    """Bytes that this process, all its threads, had fetched from the disk; what the page cache gave is not in it."""
    return int(_fields(Path("/proc/self/io"))["read_bytes"])


def memory_bytes() -> dict[str, int]:
    """Resident bytes of this process: now, of these the anonymous, and the peak since ``reset_peak_memory``."""
    status = _fields(Path("/proc/self/status"))
    names = {"rss": "VmRSS", "anonymous": "RssAnon", "peak_rss": "VmHWM"}
    return {name: int(status[key].split()[0]) * 1024 for name, key in names.items()}


def reset_peak_memory() -> None:
    """Let VmHWM count anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Write back and forget the cached pages of ``files``, so that the next read of them is cold."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@dataclass
class ForeignCpu:
    """Share of the machine's CPU time that others took (hypervisor included) while this process worked; 0 when idle."""

    share: float = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Sets ``share`` from what happened inside."""
        others, start = _others_cpu_seconds(), time.perf_counter()
        yield
        capacity = (time.perf_counter() - start) * len(os.sched_getaffinity(0))
        self.share = max(0.0, (_others_cpu_seconds() - others) / capacity)


def foreign_cpu(seconds: float) -> float:
    """Sleeps, and says which share of the machine's CPU time others used meanwhile."""
    meter = ForeignCpu()
    with meter.measure():
        time.sleep(seconds)
    return meter.share


def _others_cpu_seconds() -> float:
    """CPU seconds that anyone but this process has spent so far, over all cores."""
    first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[:8])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _fields(path: Path) -> dict[str, str]:
    """``name: value`` lines; of repeated names the first (cpuinfo's first core) stays."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found
