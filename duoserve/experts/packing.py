"""From checkpoint tensors to packed experts: one row at a time, or all of them into a pack on disk.

B bytes of a row.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from duoserve.errors import CheckpointError, CopyError
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.formats.codes import WeightFormat
from duoserve.experts.formats.expert_row import RowWriter, down_first
from duoserve.experts.formats.reading import read_codes
from duoserve.experts.formats.scratch import Scratch
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pack_folder import SCRATCH, alone_in, is_packed, publish, say
from duoserve.experts.pack_format import HEADER_FILE, PACK_FILE, PackHeader
from duoserve.experts.pieces import ExpertPieces, MatrixPiece, RowPart, float_parts, part_places, places, whole
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore
from duoserve.files.whole import remove_left, scratch_folder

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
# Rows are whole pages in memory and in the file: written past the page cache, they drive nothing out of it, and nobody
# reads them from there.
DIRECT = os.O_DIRECT
WORKERS = 3  # two read or convert while one waits for the disk; each holds a part of a row and what it is made from
# So many parts are handed to the workers at once: an exit in the middle waits until they have done all that they have.
HANDED_OUT = 2 * WORKERS
# Floats are packed in parts: a row may have hundreds of MB, which would come from memory that caches do not hold.
PART_BYTES = 4 << 20
Task = tuple[ExpertId, RowPart]


class CheckpointStore(ExpertStore):
    """An ExpertStore that packs each expert when it is read, straight from the checkpoint's tensors.

    ``form`` is the format that the checkpoint has them in, None for floats; it must be what the layout's rows are made
    of. The checkpoint stays its opener's: ``close`` leaves it open. Thread-safe.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: ExpertLayout,
        pieces: Callable[[ExpertId], ExpertPieces],
        form: WeightFormat | None = None,
    ) -> None:
        self.layout = layout
        self._checkpoint = checkpoint
        self._pieces = pieces
        self._form = form
        self._threads = threading.local()

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """Fills a uint8 CPU row [slot_bytes], converting to what the layout has; the padding becomes zero.

        CopyError names the expert, the file and the offset.
        """
        if self._form is None:
            self._convert(expert, row_B)
        else:
            self._repack(expert, row_B, self._form)
        for start, stop in self.layout.gaps:
            row_B[start:stop].zero_()

    def parts(self, expert: ExpertId) -> Sequence[RowPart]:
        """As in ExpertStore: floats in parts of some MB, where the checkpoint has them row by row."""
        if self._form is not None or any(piece.transposed for piece in self._pieces(expert)):
            return whole(self.layout)
        return float_parts(self.layout, PART_BYTES)

    def read_part(self, expert: ExpertId, part: RowPart, part_B: Tensor) -> None:
        """As in ExpertStore; errors as of ``read``."""
        if part == RowPart(0, self.layout.slot_bytes):
            self.read(expert, part_B)
            return
        targets = part_places(self.layout, part, part_B)
        for piece in self._pieces(expert):
            if piece.matrix in targets:
                target, rows = targets[piece.matrix]
                self._fill(expert, piece.cut(*rows), target)

    def close(self) -> None:
        """Nothing to release."""

    def _convert(self, expert: ExpertId, row_B: Tensor) -> None:
        targets = places(self.layout, row_B)
        for piece in self._pieces(expert):
            target = targets[piece.matrix]
            self._fill(expert, piece, target.T if piece.transposed else target)

    def _repack(self, expert: ExpertId, row_B: Tensor, form: WeightFormat) -> None:
        try:
            scratch = self._scratch()
            writer = RowWriter(self.layout.weights(row_B[None]), scratch)
            for piece in sorted(self._pieces(expert), key=lambda piece: down_first(piece.matrix)):
                codes = read_codes(self._checkpoint, form, piece, scratch)
                writer.add(piece.matrix, codes)
            writer.finish()
        except CheckpointError as error:
            raise CopyError(f"{expert}: {error}") from error

    def _scratch(self) -> Scratch:
        """The scratch memory of the calling thread, as long as it lives."""
        if not hasattr(self._threads, "scratch"):
            self._threads.scratch = Scratch()
        scratch: Scratch = self._threads.scratch
        return scratch

    def _fill(self, expert: ExpertId, piece: MatrixPiece, out: Tensor) -> None:
        try:
            self._checkpoint.read_into(piece.name, out, piece.entry, piece.rows)
        except CheckpointError as error:
            info = self._checkpoint.tensors.get(piece.name)
            place = f", {info.file} from byte {info.part(piece.entry, piece.rows).offset}" if info else ""
            raise CopyError(f"{expert}{place}: {error}") from error


def write_pack(  # noqa: PLR0913
    store: ExpertStore,
    experts: Sequence[ExpertId],
    path: Path,
    fingerprint: str,
    progress: bool = False,
    *,
    changed_ns: int = 0,
) -> bool:
    """Packs ``experts`` (at least one) into the folder ``path``: PACK_FILE with their rows, HEADER_FILE.

    The pack has one layer more than the highest among ``experts``, and likewise experts per layer; rows of experts that
    are not among them are zero. It appears whole or not at all. Gives False if a pack is there that is not older than
    ``changed_ns``, when the checkpoint was changed; that pack stays. Of several processes one packs, and the others
    wait. What killed processes have left, here and in the folders beside this one, is removed. With ``progress`` the
    progress bar shows not only on a terminal. Raises CheckpointError if the disk is full or fails.
    """
    layers, numbers = (max(ids) + 1 for ids in zip(*experts, strict=True))
    header = PackHeader.for_layout(store.layout, layers, numbers, fingerprint)
    nbytes = len(experts) * header.slot_bytes  # the rows of layers without experts are holes in the file
    try:
        path.mkdir(parents=True, exist_ok=True)
        with alone_in(path):
            remove_left(path.parent, f"*/{SCRATCH}")
            if is_packed(path, header, changed_ns):
                return False
            if is_packed(path, header):
                say(f"{path}: the checkpoint is newer than this pack: packing it again")
            _check_space(path, nbytes)
            made_ns = max(time.time_ns(), changed_ns)  # before the first read: what changes while it is read is newer
            with scratch_folder(path, SCRATCH) as scratch:
                _write_files(store, experts, header, scratch, progress)
                publish(scratch, path, made_ns)
        return True
    except OSError as error:
        raise CheckpointError(_disk_failure(path, nbytes, error)) from error


def _write_files(
    store: ExpertStore, experts: Sequence[ExpertId], header: PackHeader, folder: Path, progress: bool
) -> None:
    with _synced(folder / PACK_FILE, DIRECT) as descriptor:
        _write_rows(store, sorted(experts), header, descriptor, progress)
    with _synced(folder / HEADER_FILE) as descriptor:
        os.write(descriptor, json.dumps(header.to_dict(), indent=2).encode())


def _check_space(folder: Path, nbytes: int) -> None:
    if shutil.disk_usage(folder).free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _disk_failure(path: Path, nbytes: int, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: the pack cannot be written ({error}); choose another cache folder (DUOSERVE_CACHE)"
    there = next(folder for folder in (path, *path.parents) if folder.exists())  # it may be what could not be made
    free = shutil.disk_usage(there).free
    return (
        f"{path}: the disk is full: the pack takes {nbytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
        "make room, or choose another cache folder (DUOSERVE_CACHE)"
    )


@contextmanager
def _synced(path: Path, flags: int = 0) -> Iterator[int]:
    """The descriptor of a new file whose bytes are on the disk when the block ends; ``flags`` where they are known."""
    try:
        descriptor = os.open(path, NEW_FILE | flags, mode=0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, NEW_FILE, mode=0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_rows(
    store: ExpertStore, experts: Sequence[ExpertId], header: PackHeader, descriptor: int, progress: bool
) -> None:
    tasks = [(expert, part) for expert in experts for part in store.parts(expert)]
    largest = max(part.stop - part.start for _, part in tasks)
    buffers = threading.local()  # each worker has one of its own
    converting = threading.Semaphore(WORKERS - 1)  # else all would convert at once, and then all wait for the disk

    def pack(task: Task) -> int:
        expert, part = task
        if not hasattr(buffers, "bytes_B"):
            buffers.bytes_B = aligned_rows(1, largest)[0]
        part_B = buffers.bytes_B[: part.stop - part.start]
        with converting:
            store.read_part(expert, part, part_B)
        _write_at(descriptor, part_B, header.offset(expert) + part.start)
        return len(part_B)

    hidden = False if progress else None
    nbytes = len(experts) * header.slot_bytes
    with (
        ThreadPoolExecutor(WORKERS) as pool,
        tqdm(desc="packing experts", total=nbytes, unit="B", unit_scale=True, disable=hidden) as bar,
    ):
        for done in _few_at_once(pool, pack, tasks):
            bar.update(done)
    os.truncate(descriptor, header.total_bytes)


def _few_at_once(pool: ThreadPoolExecutor, work: Callable[[Task], int], tasks: Iterable[Task]) -> Iterator[int]:
    """What ``work`` gives for each of ``tasks``, in their order, of which the pool never has more than HANDED_OUT."""
    given: deque[Future[int]] = deque()
    try:
        for task in tasks:
            if len(given) == HANDED_OUT:
                yield given.popleft().result()
            given.append(pool.submit(work, task))
        while given:
            yield given.popleft().result()
    finally:
        for future in given:
            future.cancel()


def _write_at(descriptor: int, row_B: Tensor, offset: int) -> None:
    left = row_B.numpy().data
    while left:
        direct = _goes_direct(descriptor)  # before the write: another thread may have it otherwise behind it
        try:
            written = os.pwrite(descriptor, left, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            # A file system that takes the flag and then refuses the writes; or what a short one left is no whole block.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT)
        else:
            left, offset = left[written:], offset + written


def _goes_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)
