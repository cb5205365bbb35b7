"""Packed experts in a file: every byte arrives, disks that fail are tried again, other models' packs are refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duoserve.errors import CheckpointError, ClosedError, CopyError
from duoserve.experts.disk_store import DiskStore, ReadAt
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pack_format import HEADER_FILE, PACK_FILE
from duoserve.experts.rows import aligned_rows
from tests.helpers.fakes import SMALL, ArrayStore, Gate, save_pack

FINGERPRINT = "f" * 64
EXPERT = ExpertId(1, 2)  # row 6 of the pack
OFFSET = 6 * SMALL.slot_bytes


class FaultyDisk:
    """``os.preadv``, but what ``fault(number of the read)`` says comes first; counts reads and bytes from arm() on."""

    def __init__(self, *, direct: bool) -> None:
        self.fds: set[int] = set()
        self.reads = self.nbytes = 0
        self._refuse_probe = not direct
        self._fault: Callable[[int], int | None] = lambda number: None

    def arm(self, fault: Callable[[int], int | None]) -> None:
        """``fault`` raises, or returns the greatest number of bytes that a read may give (None: any)."""
        self._fault = fault
        self.reads = self.nbytes = 0

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.fds.add(fd)
        if self._refuse_probe:
            self._refuse_probe = False
            raise OSError(errno.EINVAL, "direct reads are not supported")
        self.reads += 1
        limit = self._fault(self.reads)
        count = os.preadv(fd, [buffers[0][:limit]], offset)
        self.nbytes += count
        return count


def eio(number: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def open_pack(folder: Path, read_at: ReadAt = os.preadv, sleep: Callable[[float], None] = lambda s: None) -> DiskStore:
    return DiskStore(folder, SMALL, 2, 4, FINGERPRINT, read_at=read_at, sleep=sleep)


def slot() -> Tensor:
    return aligned_rows(1, SMALL.slot_bytes)[0]


@pytest.fixture
def truth() -> ArrayStore:
    return ArrayStore(num_layers=2, num_experts=4)


@pytest.fixture
def folder(truth: ArrayStore, tmp_path: Path) -> Path:
    return save_pack(truth, tmp_path / "pack")


@pytest.fixture(params=["direct", "buffered"])
def disk(request: pytest.FixtureRequest) -> FaultyDisk:
    return FaultyDisk(direct=request.param == "direct")


@pytest.fixture
def store(folder: Path, disk: FaultyDisk, request: pytest.FixtureRequest) -> Iterator[DiskStore]:
    store = open_pack(folder, disk)
    if "direct" in request.node.callspec.id and not store.direct:
        pytest.skip("the file system of the temporary folder has no direct reads")
    yield store
    store.close()


def test_every_expert_arrives_and_no_byte_more_is_read(store: DiskStore, disk: FaultyDisk, truth: ArrayStore) -> None:
    disk.arm(lambda number: None)
    row_B = slot()
    for expert in truth.experts:
        store.read(expert, row_B)
        assert torch.equal(row_B, truth.row(expert))
    assert disk.nbytes == len(truth.experts) * SMALL.slot_bytes


def test_direct_says_how_the_file_is_open(store: DiskStore, disk: FaultyDisk) -> None:
    store.read(EXPERT, slot())
    flags = fcntl.fcntl(max(disk.fds), fcntl.F_GETFL)
    assert bool(flags & os.O_DIRECT) == store.direct


def test_a_file_system_in_memory(truth: ArrayStore) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no writable tmpfs")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        store = open_pack(save_pack(truth, folder))
        row_B = slot()
        store.read(EXPERT, row_B)
        store.close()
        assert torch.equal(row_B, truth.row(EXPERT))
    finally:
        shutil.rmtree(folder)


def test_file_systems_that_refuse_the_flag_are_read_buffered(
    folder: Path, truth: ArrayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def open_like_old_tmpfs(path: Path, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *args)

    monkeypatch.setattr(os, "open", open_like_old_tmpfs)
    store = open_pack(folder)
    row_B = slot()
    store.read(EXPERT, row_B)
    store.close()
    assert not store.direct and torch.equal(row_B, truth.row(EXPERT))


@pytest.mark.parametrize("limit", [4096, 5000, 8191])
def test_short_reads_go_on_where_they_stopped(
    limit: int, store: DiskStore, disk: FaultyDisk, truth: ArrayStore
) -> None:
    disk.arm(lambda number: limit - limit % 4096 if store.direct else limit)
    row_B = slot()
    store.read(EXPERT, row_B)
    assert torch.equal(row_B, truth.row(EXPERT))
    assert disk.nbytes == SMALL.slot_bytes and disk.reads > 1


@pytest.mark.parametrize("left", [0, 1, 4096, 5000, SMALL.slot_bytes - 1])
def test_a_file_truncated_while_open_is_an_error_at_once(
    left: int, store: DiskStore, disk: FaultyDisk, folder: Path, truth: ArrayStore
) -> None:
    os.truncate(folder / PACK_FILE, OFFSET + left)
    with pytest.raises(CopyError, match=rf"expert 1/2, .*experts\.pack at byte {OFFSET}.* after {left} of 12288 bytes"):
        store.read(EXPERT, slot())
    assert disk.reads <= 4  # the probe and at most one read for each page
    row_B = slot()
    store.read(ExpertId(1, 1), row_B)
    assert torch.equal(row_B, truth.row(ExpertId(1, 1)))


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failed_read_is_tried_twice_more(failures: int, folder: Path, truth: ArrayStore, disk: FaultyDisk) -> None:
    pauses: list[float] = []
    store = open_pack(folder, disk, pauses.append)
    disk.arm(lambda number: eio(number) if number <= failures else None)
    row_B = slot()
    store.read(EXPERT, row_B)
    store.close()
    assert torch.equal(row_B, truth.row(EXPERT))
    assert pauses == [0.01, 0.1][:failures]


def test_a_read_that_fails_half_way_starts_again(store: DiskStore, disk: FaultyDisk, truth: ArrayStore) -> None:
    disk.arm(lambda number: eio(number) if number == 2 else 4096)
    row_B = slot()
    store.read(EXPERT, row_B)
    assert torch.equal(row_B, truth.row(EXPERT))


def test_a_dead_disk_is_an_error_that_says_where(store: DiskStore, disk: FaultyDisk, folder: Path) -> None:
    disk.arm(eio)
    with pytest.raises(CopyError) as caught:
        store.read(EXPERT, slot())
    for part in ("expert 1/2", str(folder / PACK_FILE), f"at byte {OFFSET}", "Errno 5"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert disk.reads == 3


def test_many_threads_read_at_once(store: DiskStore, truth: ArrayStore) -> None:
    wrong: list[ExpertId] = []

    def read_all(first: int) -> None:
        row_B = slot()
        for expert in truth.experts[first:] + truth.experts[:first]:
            store.read(expert, row_B)
            if not torch.equal(row_B, truth.row(expert)):
                wrong.append(expert)

    threads = [threading.Thread(target=read_all, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "bad_row",
    [
        pytest.param(lambda: slot()[:-4096], id="short"),
        pytest.param(lambda: slot().view(torch.int16), id="not_bytes"),
        pytest.param(lambda: aligned_rows(1, 2 * SMALL.slot_bytes)[0][::2], id="strided"),
        pytest.param(lambda: aligned_rows(2, SMALL.slot_bytes).view(-1)[256:][: SMALL.slot_bytes], id="unaligned"),
    ],
)
def test_memory_that_is_no_slot_is_refused(bad_row: Callable[[], Tensor], folder: Path) -> None:
    store = open_pack(folder)
    with pytest.raises(ValueError, match="a row"):
        store.read(EXPERT, bad_row())
    store.close()


@pytest.mark.parametrize("expert", [ExpertId(2, 0), ExpertId(0, 4), ExpertId(-1, 0), ExpertId(0, -1)])
def test_experts_that_the_model_has_not(expert: ExpertId, folder: Path) -> None:
    store = open_pack(folder)
    with pytest.raises(KeyError):
        store.read(expert, slot())
    store.close()


def test_closed_store_refuses_and_closes_again(folder: Path) -> None:
    disk = FaultyDisk(direct=True)
    store = open_pack(folder, disk)
    store.close()
    store.close()
    with pytest.raises(ClosedError, match=r"experts\.pack"):
        store.read(EXPERT, slot())
    with pytest.raises(OSError):
        os.fstat(max(disk.fds))


def test_a_store_that_nobody_has_any_more_is_closed(folder: Path) -> None:
    disk = FaultyDisk(direct=True)
    open_pack(folder, disk).read(EXPERT, slot())
    with pytest.raises(OSError):
        os.fstat(max(disk.fds))


def test_close_leaves_a_running_read_its_file(folder: Path, truth: ArrayStore) -> None:
    disk, gate = FaultyDisk(direct=True), Gate()
    store = open_pack(folder, disk)
    disk.arm(lambda number: gate.pass_through())
    row_B = slot()
    reader = threading.Thread(target=store.read, args=(EXPERT, row_B))
    reader.start()
    gate.wait_entered()
    store.close()
    os.fstat(max(disk.fds))  # still open
    gate.open()
    reader.join()
    assert torch.equal(row_B, truth.row(EXPERT))
    with pytest.raises(OSError):
        os.fstat(max(disk.fds))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ((ExpertLayout(torch.float16, 64, 32), 2, 4, FINGERPRINT), "dtype is 'bfloat16', needed is 'float16'"),
        ((ExpertLayout(torch.bfloat16, 32, 64), 2, 4, FINGERPRINT), "hidden is 64, needed is 32"),
        ((SMALL, 1, 8, FINGERPRINT), "num_layers is 2, needed is 1"),
        ((SMALL, 2, 5, FINGERPRINT), "num_experts is 4, needed is 5"),
        ((SMALL, 2, 4, "e" * 64), f"fingerprint is '{FINGERPRINT}', needed is 'eee"),
    ],
)
def test_packs_of_other_models_are_refused(model: tuple[ExpertLayout, int, int, str], named: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="pack the checkpoint again") as caught:
        DiskStore(folder, *model)
    assert named in str(caught.value) and str(folder) in str(caught.value)


def test_the_fingerprint_is_not_looked_at_unless_given(folder: Path, truth: ArrayStore) -> None:
    row_B = slot()
    with closing(DiskStore(folder, SMALL, 2, 4, None)) as store:
        store.read(EXPERT, row_B)
    assert torch.equal(row_B, truth.row(EXPERT))


@pytest.mark.parametrize("change", [-1, -SMALL.slot_bytes, 4096])
def test_packs_of_another_size_are_refused(change: int, folder: Path) -> None:
    size = 8 * SMALL.slot_bytes
    os.truncate(folder / PACK_FILE, size + change)
    with pytest.raises(CheckpointError, match=f"has {size + change} bytes where pack.json means {size}"):
        open_pack(folder)


def test_a_missing_pack_is_refused(folder: Path) -> None:
    (folder / PACK_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"experts\.pack: cannot be opened"):
        open_pack(folder)


def test_a_pack_that_cannot_be_read_at_all_is_refused_and_closed(folder: Path) -> None:
    disk = FaultyDisk(direct=True)
    disk.arm(eio)
    with pytest.raises(CheckpointError, match="Input/output error"):
        open_pack(folder, disk)
    with pytest.raises(OSError):
        os.fstat(max(disk.fds))


def test_a_header_without_sense_is_refused(folder: Path) -> None:
    (folder / HEADER_FILE).write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CheckpointError, match="99"):
        open_pack(folder)
