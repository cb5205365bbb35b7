"""Files read by position: never mapped, so that a file cut short under us is an error and not a SIGBUS."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from duoserve.errors import CheckpointError, ClosedError

MAX_BUFFERS = 1024  # buffers that one call takes (IOV_MAX)


class PositionalFile:
    """A regular file, open for reading at any offset from any thread (no shared file position).

    ``size`` is in bytes, ``modified_ns`` the time of the last change, both as they were on opening.
    """

    def __init__(self, path: Path) -> None:
        """Opens ``path``; raises CheckpointError if that fails or it is not a regular file."""
        self.path = path
        try:
            # Non-blocking, or opening a named pipe would hang; it makes no difference to regular files.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: is missing; finish the download, or give the folder that has it") from error
        except (OSError, ValueError) as error:  # ValueError: a name that the file system cannot have
            raise CheckpointError(f"{path}: cannot be opened ({error})") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{path}: is not a regular file")
        self.size = status.st_size
        self.modified_ns = status.st_mtime_ns

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills ``buffer`` (writable bytes) from byte ``offset``.

        Raises CheckpointError if the read fails or comes up short, or if the file has changed.
        """
        done = 0
        while done < len(buffer):
            count = self._read_some([buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends after {done} of the {len(buffer)} bytes wanted at byte {offset}; "
                    "the file is truncated, download it again"
                )
            done += count

    def read_rows(self, rows: np.ndarray, offset: int) -> None:
        """Fills the rows of ``rows`` (uint8 [N, B], each contiguous) one after another; errors as in ``read_into``."""
        (num_rows, row_bytes), step = rows.shape, rows.strides[0]
        span = as_strided(rows, ((num_rows - 1) * step + row_bytes,), (1,)).data  # slicing it costs less than rows[i]
        for first in range(0, num_rows, MAX_BUFFERS):
            starts = range(first * step, min(first + MAX_BUFFERS, num_rows) * step, step)
            batch = [span[start : start + row_bytes] for start in starts]
            count = self._read_some(batch, offset + first * row_bytes)
            for row in range(count // row_bytes, len(batch)):  # the rows that a short read left
                self.read_into(batch[row], offset + (first + row) * row_bytes)

    def read(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from byte ``offset``; errors as in ``read_into``."""
        data = bytearray(nbytes)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def expect(self, offset: int, nbytes: int) -> None:
        """Has the system bring these bytes into its page cache meanwhile: they will be read soon.

        Many small reads, all expected before the first, take a quarter of the time where the disk waits (bench/LOG.md).
        """
        if nbytes:  # none would mean all up to the end
            with suppress(OSError):  # the read will say what is wrong
                os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Idempotent; no read may be under way."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise CheckpointError(
                f"{self.path}: changed after it was opened ({self.size} bytes then, {now.st_size} now); "
                "load the model or trace again"
            )

    def _read_some(self, buffers: list[memoryview], offset: int) -> int:
        """Fills as much of the buffers as one call does, and gives the number of bytes."""
        if self._fd < 0:
            raise ClosedError(f"{self.path}: read after close()")
        try:
            self._check_unchanged()
            return os.preadv(self._fd, buffers, offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading at byte {offset} failed ({error})") from error


def is_file(path: Path) -> bool:
    """Whether a file is there. False also if looking is not permitted; then writing there says why."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether anything is there; raises CheckpointError if looking is not permitted, as something may be there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a name that the file system cannot have
        raise CheckpointError(f"{path}: cannot be looked for ({error}); see who may enter that folder") from error
    return True


def read_capped(path: Path, max_bytes: int) -> bytes:
    """The bytes of a whole small file; raises CheckpointError if there are more than ``max_bytes``."""
    file = PositionalFile(path)
    try:
        if file.size > max_bytes:
            raise CheckpointError(f"{path}: {file.size} bytes, more than the {max_bytes} that such a file may have")
        return file.read(0, file.size)
    finally:
        file.close()
