"""How many cores' time a process may take, by made-up files of the kernel, and the warning of more threads."""

from __future__ import annotations

import os
import warnings
from math import inf
from pathlib import Path

import pytest
import torch

from duoserve import MoEModel
from duoserve.experts import host_cores
from duoserve.experts.host_cores import allowed_cores, cpu_model, last_cache_bytes, usable_cores, warn_of_excess_threads
from tests.experts.kernel_files import in_no_group, write
from tests.helpers.checkpoints import BARD


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return in_no_group(tmp_path)


def allowed(root: Path) -> float:
    return allowed_cores(root / "proc", root / "groups")


def test_the_narrowest_of_nested_groups_counts(root: Path) -> None:
    assert allowed(root) == inf
    write(root / "proc/self/cgroup", "0::/pod/a\n")
    write(root / "groups/pod/a/cpu.max", "max 100000\n")
    assert allowed(root) == inf
    write(root / "groups/pod/cpu.max", "350000 100000\n")
    write(root / "groups/other/cpu.max", "50000 100000\n")
    assert allowed(root) == 3.5
    write(root / "groups/pod/a/cpu.max", "100000 50000\n")
    assert allowed(root) == 2


def test_groups_of_the_first_version(root: Path) -> None:
    """A container's own group is the root of what it sees, whatever its path outside."""
    write(root / "proc/self/cgroup", "9:cpu,cpuacct:/docker/1\n5:memory:/docker/1\n0::/\n")
    write(root / "groups/cpu/docker/1/cpu.cfs_quota_us", "-1\n")
    write(root / "groups/cpu/docker/1/cpu.cfs_period_us", "100000\n")
    assert allowed(root) == inf
    write(root / "groups/cpu/cpu.cfs_quota_us", "150000\n")
    write(root / "groups/cpu/cpu.cfs_period_us", "100000\n")
    assert allowed(root) == 1.5


def test_no_more_cores_are_usable_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3})
    for limit, usable in ((inf, 3), (3.5, 3), (1.5, 1.5)):
        monkeypatch.setattr(host_cores, "allowed_cores", lambda limit=limit: limit)
        assert usable_cores() == usable


def test_a_cpu_is_called_by_all_that_tells_it_from_others(root: Path) -> None:
    x86 = "processor\t: {core}\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\ncpu MHz\t: {core}000.0\n\n"
    write(root / "proc/cpuinfo", "".join(x86.format(core=core) for core in range(2)))
    assert cpu_model(root / "proc") == "AMD EPYC, 25, 17"
    write(root / "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 2100.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    assert cpu_model(root / "proc") == "0x41, 0xd40"
    (root / "proc/cpuinfo").unlink()
    assert cpu_model(root / "proc") == ""


def cache(root: Path, core: int, index: int, level: int, size: str, shared: str) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{core}/cache/index{index}"
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        write(folder / name, f"{text}\n")


def test_the_last_caches_of_the_cores_that_may_be_used_add_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores 0 to 3 share one, 4 to 7 another, and 8 to 11 a third, which is not ours."""
    for core in range(12):
        first = core // 4 * 4
        cache(root, core, 0, 1, "32K", str(core))
        cache(root, core, 3, 3, "32768K", f"{first}-{first + 3}")
        cache(root, core, 2, 2, "1024K", str(core))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3, 4})
    assert last_cache_bytes(root / "sys") == 64 << 20
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {20})
    assert last_cache_bytes(root / "sys") == 0


def test_a_model_on_a_cpu_warns_of_threads_that_cannot_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(host_cores, "allowed_cores", lambda: 3.5)
    asks = r"64 threads, .* time of 3\.5 cores .*torch\.set_num_threads\(3\).* OMP_NUM_THREADS=3"
    with (
        pytest.warns(UserWarning, match=asks) as shown,
        MoEModel.from_pretrained(BARD, device="cpu", max_context=64),
    ):
        assert [each.filename for each in shown] == [__file__]


@pytest.mark.parametrize(("threads", "cores"), [(1, 0.5), (3, 3.5), (4, 4.0), (64, inf)])
def test_threads_that_can_all_run_are_fine(threads: int, cores: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(host_cores, "allowed_cores", lambda: cores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_excess_threads()
