"""Where experts wait: rows of memory that the system backs at once, and tiers that know which of them has what."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest
import torch

from duoserve.errors import ClosedError, MemoryBudgetError
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import HostStore, TieredStore
from tests.helpers.fakes import SMALL, ArrayStore

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def mapping_flags(address: int) -> list[str]:
    """The VmFlags of the mapping that ``address`` lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name:
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return rest.split()
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("n", [0, 1, 5])
def test_aligned_rows_are_zeroed_and_each_starts_on_a_page(n: int) -> None:
    rows_NB = aligned_rows(n, 12288)
    assert rows_NB.dtype == torch.uint8 and rows_NB.shape == (n, 12288) and rows_NB.is_contiguous()
    assert not rows_NB.any()
    assert all(row_B.data_ptr() % 4096 == 0 for row_B in rows_NB)


def test_aligned_rows_are_backed_at_once_and_given_back_with_the_last_view() -> None:
    gc.collect()
    before = resident_bytes()
    view_B = aligned_rows(32, MIB)[3]
    assert resident_bytes() - before >= 31 * MIB
    assert int(view_B.sum()) == 0
    del view_B
    gc.collect()
    assert resident_bytes() - before < 16 * MIB


def test_aligned_rows_ask_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    rows_NB = aligned_rows(8, MIB)
    assert "hg" in mapping_flags(rows_NB.data_ptr())


def test_aligned_rows_that_could_not_all_be_aligned_are_refused() -> None:
    with pytest.raises(ValueError, match="6144"):
        aligned_rows(2, 6144)


@pytest.mark.parametrize("n", [1 << 40, 1 << 60])
def test_memory_that_the_system_has_not_is_refused_with_the_numbers(n: int) -> None:
    with pytest.raises(MemoryBudgetError, match=f"{n} rows of 12288 bytes need {n * 12288} bytes"):
        aligned_rows(n, 12288)


def test_host_store_copies_rows_out_without_asking_the_source_again() -> None:
    source = ArrayStore()
    store = HostStore(source, source.experts)
    asked = len(source.reads)
    slot_B = aligned_rows(1, SMALL.slot_bytes)[0]
    for expert in reversed(source.experts):
        store.read(expert, slot_B)
        assert torch.equal(slot_B, source.row(expert))
    assert asked == len(source.reads) == len(source.experts)
    assert not source.closed


def test_host_store_has_only_what_it_was_given() -> None:
    source = ArrayStore()
    store = HostStore(source, [ExpertId(1, 2)], progress=True)
    assert store.has(ExpertId(1, 2)) and not store.has(ExpertId(0, 0))
    with pytest.raises(KeyError):
        store.read(ExpertId(0, 0), aligned_rows(1, SMALL.slot_bytes)[0])


def test_host_store_of_nothing() -> None:
    assert not HostStore(ArrayStore(), []).has(ExpertId(0, 0))


def test_closed_host_store_refuses_and_closes_again() -> None:
    store = HostStore(ArrayStore(), [ExpertId(0, 1)])
    store.close()
    store.close()
    with pytest.raises(ClosedError, match="0/1"):
        store.read(ExpertId(0, 1), aligned_rows(1, SMALL.slot_bytes)[0])


def test_tiers_read_from_ram_what_is_there_and_the_rest_from_disk() -> None:
    disk = ArrayStore()
    host = HostStore(disk, disk.experts[:3])
    tiers = TieredStore(host, disk)
    disk.reads.clear()
    slot_B = aligned_rows(1, SMALL.slot_bytes)[0]
    for expert in disk.experts:
        tiers.read(expert, slot_B)
        assert torch.equal(slot_B, disk.row(expert))
    assert disk.reads == disk.experts[3:]
    assert tiers.layout == SMALL


def test_closing_the_tiers_closes_both() -> None:
    disk = ArrayStore()
    host = HostStore(disk, disk.experts)
    TieredStore(host, disk).close()
    assert disk.closed
    with pytest.raises(ClosedError):
        host.read(ExpertId(0, 0), aligned_rows(1, SMALL.slot_bytes)[0])


def test_tiers_of_different_rows_are_refused() -> None:
    other = ArrayStore(ExpertLayout(torch.float32, hidden=64, intermediate=32))
    with pytest.raises(ValueError, match="float32"):
        TieredStore(HostStore(ArrayStore(), []), other)
