"""Packed experts in a file, read by position straight into a row's memory, past the page cache where that works.

B bytes of one row.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from duoserve.errors import CheckpointError, ClosedError, CopyError
from duoserve.experts.layout import ROW_ALIGNMENT, ExpertId, ExpertLayout
from duoserve.experts.pack_format import PACK_FILE, REMEDY, PackHeader, read_pack_header
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore

# Like os.preadv: descriptor, buffers, byte offset -> bytes read.
ReadAt = Callable[[int, list[memoryview], int], int]

_RETRY_PAUSES_S = (0.01, 0.1)  # a disk that is back within this time costs a hiccup, not a request
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class DiskStore(ExpertStore):
    """The experts of the pack in folder ``path``, made by ``write_pack``.

    ``direct`` says whether reads go past the page cache; where the file system cannot do that they are buffered.
    ``read_at`` and ``sleep`` are there for tests; the first call of ``read_at`` probes for direct reads.
    """

    def __init__(  # noqa: PLR0913
        self,
        path: Path,
        layout: ExpertLayout,
        num_layers: int,
        num_experts: int,
        fingerprint: str | None,
        *,
        read_at: ReadAt = os.preadv,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """CheckpointError unless the pack holds just these experts, of the checkpoint with that ``fingerprint``."""
        self.layout = layout
        self.file = path / PACK_FILE
        self._header = read_pack_header(path)
        wanted = fingerprint if fingerprint is not None else self._header.fingerprint
        _check_header(path, self._header, PackHeader.for_layout(layout, num_layers, num_experts, wanted))
        self._read_at = read_at
        self._sleep = sleep
        self._lock = threading.Lock()
        self._readers = 0
        self._closed = False
        try:
            _check_size(self.file, self._header.total_bytes)
            self._fd, self.direct = _open(self.file, read_at)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be opened ({error}); {REMEDY}") from error
        # A descriptor is but a number, which nothing would close if nobody called close(). When the program ends,
        # threads may still be reading, and the system closes it.
        self._shut = finalize(self, os.close, self._fd)
        self._shut.atexit = False

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """As in ExpertStore; KeyError for an expert that the model has not.

        A read that the system fails is tried twice more. CopyError when that does not help, or when the file has
        become too short.
        """
        if not (0 <= expert.layer < self._header.num_layers and 0 <= expert.expert < self._header.num_experts):
            raise KeyError(expert)
        buffer = self._buffer(row_B)
        with self._descriptor() as fd:
            for pause in (*_RETRY_PAUSES_S, None):
                try:
                    return self._fill(fd, buffer, expert)
                except OSError as error:
                    if pause is None:
                        raise CopyError(f"{self._where(expert)}: every read failed, at last with {error}") from error
                self._sleep(pause)

    def close(self) -> None:
        """Closes the file as soon as no read uses it; idempotent."""
        with self._lock:
            self._closed = True
            self._close_if_unused()

    def _buffer(self, row_B: Tensor) -> memoryview:
        nbytes = self.layout.slot_bytes
        if row_B.dtype != torch.uint8 or row_B.shape != (nbytes,) or not row_B.is_contiguous():
            raise ValueError(f"a row is {nbytes} contiguous bytes, not {row_B.dtype} {tuple(row_B.shape)}")
        if row_B.data_ptr() % ROW_ALIGNMENT:
            raise ValueError(f"a row starts on a multiple of {ROW_ALIGNMENT} bytes, not at {row_B.data_ptr():#x}")
        return row_B.numpy().data

    def _fill(self, fd: int, buffer: memoryview, expert: ExpertId) -> None:
        offset = self._header.offset(expert)
        done = 0
        while done < len(buffer):
            count = self._read_at(fd, [buffer[done:]], offset + done)
            if count == 0:
                raise CopyError(
                    f"{self._where(expert)}: the file ends after {done} of {len(buffer)} bytes, it was "
                    f"truncated while in use; {REMEDY}"
                )
            done += count

    def _where(self, expert: ExpertId) -> str:
        return f"{expert}, {self.file} at byte {self._header.offset(expert)}"

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """The open file, which close() in another thread leaves open until we are through.

        Otherwise the number could by then stand for a file opened by somebody else.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self.file}: read after close()")
            self._readers += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._readers -= 1
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and self._readers == 0:
            self._shut()  # does nothing when called again


def _check_header(path: Path, found: PackHeader, wanted: PackHeader) -> None:
    has, needs = asdict(found), asdict(wanted)
    wrong = [f"{name} is {has[name]!r}, needed is {needs[name]!r}" for name in needs if has[name] != needs[name]]
    if wrong:
        raise CheckpointError(f"{path}: this pack was made for another model: {'; '.join(wrong)}; {REMEDY}")


def _check_size(file: Path, nbytes: int) -> None:
    found = file.stat().st_size
    if found != nbytes:
        raise CheckpointError(f"{file}: has {found} bytes where pack.json means {nbytes}; {REMEDY}")


def _open(file: Path, read_at: ReadAt) -> tuple[int, bool]:
    """A descriptor of ``file``, and whether its reads go past the page cache."""
    try:
        fd = os.open(file, _OPEN_FLAGS | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        if _reads_direct(fd, read_at):
            return fd, True
        os.close(fd)
    fd = os.open(file, _OPEN_FLAGS)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # experts are read out of order: read-ahead would be waste
    return fd, False


def _reads_direct(fd: int, read_at: ReadAt) -> bool:
    """Tries one block, for some file systems take the flag and then refuse the reads. Closes ``fd`` if it raises."""
    block_B = aligned_rows(1, ROW_ALIGNMENT)[0]
    try:
        read_at(fd, [block_B.numpy().data], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        os.close(fd)
        raise
    return True
