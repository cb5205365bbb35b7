"""How much RAM may be taken, by made-up files of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from duoserve.experts.host_ram import available_bytes
from tests.experts.kernel_files import GIB, in_no_group, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return in_no_group(tmp_path)


def group(folder: Path, limit: int | str, used: int, cache: tuple[int, int] = (0, 0), version: int = 2) -> None:
    """The files of one group of the second or the first version."""
    names = ["memory.max", "memory.current", ""]
    if version == 1:
        names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_"]
    write(folder / names[0], f"{limit}\n")
    write(folder / names[1], f"{used}\n")
    inactive, active = cache
    own = f"inactive_file 1\nactive_file 1\n{names[2]}inactive_file {inactive}\n{names[2]}active_file {active}\n"
    write(folder / "memory.stat", f"anon 5\n{own}")


def available(root: Path) -> int:
    return available_bytes(root / "proc", root / "groups")


def test_what_the_kernel_calls_available(root: Path) -> None:
    assert available(root) == 20 * GIB
    group(root / "groups", "max", 9 * GIB)
    assert available(root) == 20 * GIB
    (root / "proc/self/cgroup").unlink()
    assert available(root) == 20 * GIB


def test_a_groups_page_cache_is_free(root: Path) -> None:
    group(root / "groups", 8 * GIB, 7 * GIB, cache=(3 * GIB, 2 * GIB))
    assert available(root) == 6 * GIB
    (root / "groups/memory.stat").unlink()
    assert available(root) == GIB
    group(root / "groups", 8 * GIB, 9 * GIB)
    assert available(root) == 0


def test_the_narrowest_of_nested_groups_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/user.slice/a.scope\n")
    group(root / "groups/user.slice/a.scope", "max", GIB)
    group(root / "groups/user.slice", 6 * GIB, 2 * GIB)
    group(root / "groups/other.slice", 3 * GIB, 2 * GIB)
    assert available(root) == 4 * GIB
    group(root / "groups/user.slice/a.scope", 3 * GIB, GIB)
    assert available(root) == 2 * GIB


def test_a_group_that_is_slowed_down_above_a_bound_has_no_more_than_that(root: Path) -> None:
    """The kernel makes a group with more than ``memory.high`` give memory back and wait."""
    group(root / "groups", "max", 2 * GIB, cache=(GIB, 0))
    write(root / "groups/memory.high", f"{6 * GIB}\n")
    assert available(root) == 5 * GIB
    group(root / "groups", 4 * GIB, 2 * GIB, cache=(GIB, 0))
    assert available(root) == 3 * GIB
    write(root / "groups/memory.high", "max\n")
    assert available(root) == 3 * GIB


def test_groups_of_the_first_version(root: Path) -> None:
    """A container's own group is the root of what it sees, whatever its path outside."""
    write(
        root / "proc/self/cgroup",
        "9:cpu,cpuacct:/docker/1\n5:memory,hugetlb:/docker/1\n1:name=systemd:/docker/1\n0::/\n",
    )
    group(root / "groups/memory", 5 * GIB, 4 * GIB, cache=(GIB, GIB), version=1)
    assert available(root) == 3 * GIB
    group(root / "groups/memory/docker/1", 2 * GIB, GIB, version=1)
    assert available(root) == GIB
    group(root / "groups/memory/docker/1", (1 << 63) - 4096, GIB, version=1)
    assert available(root) == 3 * GIB
