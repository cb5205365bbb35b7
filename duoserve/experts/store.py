"""Where packed experts wait before they are copied into slots: in host RAM, on disk, or some in each.

B bytes of one row, N rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from weakref import finalize

import numpy as np
from torch import Tensor
from tqdm import tqdm

from duoserve.errors import ClosedError
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pieces import RowPart, whole
from duoserve.experts.pinned import pin, unpin
from duoserve.experts.rows import aligned_rows


class ExpertStore(ABC):
    """A source of packed experts."""

    layout: ExpertLayout

    @abstractmethod
    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """Fills ``row_B``, a contiguous uint8 CPU row [slot_bytes] on a 4096-byte boundary; safe from many threads.

        CopyError names the expert, the file and the offset when the bytes cannot be had; ClosedError after close().
        """

    def parts(self, expert: ExpertId) -> Sequence[RowPart]:
        """The parts of the expert's row that ``read_part`` can fill, together the whole row."""
        return whole(self.layout)

    def read_part(self, expert: ExpertId, part: RowPart, part_B: Tensor) -> None:
        """Fills uint8 ``part_B``, on a 4096-byte boundary, with one of ``parts``; else as ``read``."""
        self.read(expert, part_B)

    def host_row(self, expert: ExpertId) -> Tensor | None:
        """The expert's row where it lies in RAM, the same as long as the store is open; None if it must be read."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Gives back files and memory; idempotent."""


class HostStore(ExpertStore):
    """Packed rows of some experts in RAM, filled from ``source`` at construction; ``source`` stays the caller's.

    ``pinned`` has the rows page-locked for a GPU, where the system allows it.
    """

    def __init__(
        self, source: ExpertStore, experts: Sequence[ExpertId], progress: bool = False, pinned: bool = False
    ) -> None:
        self.layout = source.layout
        self._index = {expert: index for index, expert in enumerate(experts)}
        rows_NB = aligned_rows(len(experts), self.layout.slot_bytes)
        for expert, row_B in zip(
            tqdm(experts, desc="experts to RAM", unit="expert", disable=not progress), rows_NB, strict=True
        ):
            source.read(expert, row_B)
        self._rows_NB: Tensor | None = rows_NB
        # A registration must not outlive its memory, even if nobody calls close().
        self._unpin = finalize(self, unpin, rows_NB) if pinned and pin(rows_NB) else None

    def has(self, expert: ExpertId) -> bool:
        """Whether this expert's row is in RAM."""
        return expert in self._index

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """Copies the expert's row into ``row_B``; KeyError for an expert that was not asked for at construction."""
        rows_NB = self._rows_NB
        if rows_NB is None:
            raise ClosedError(f"{expert} was read from RAM after close()")
        # Not Tensor.copy_: it splits a large row over a team of threads of its own for each calling thread, and those
        # would take the cores from the computation. Both release the GIL.
        np.copyto(row_B.numpy(), rows_NB[self._index[expert]].numpy())

    def host_row(self, expert: ExpertId) -> Tensor | None:
        rows_NB = self._rows_NB
        return None if rows_NB is None or expert not in self._index else rows_NB[self._index[expert]]

    def close(self) -> None:
        """Gives the RAM back as soon as no read uses it; idempotent."""
        self._rows_NB = None
        if self._unpin is not None:
            self._unpin()


class TieredStore(ExpertStore):
    """Host RAM for the experts it has, ``disk`` for the others; owns both."""

    def __init__(self, host: HostStore, disk: ExpertStore) -> None:
        if host.layout != disk.layout:
            raise ValueError(f"the tiers hold different rows: {host.layout} in RAM, {disk.layout} on disk")
        self.layout = disk.layout
        self._host = host
        self._disk = disk

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """Fills ``row_B`` from the fastest tier that has the expert; errors are that tier's."""
        tier: ExpertStore = self._host if self._host.has(expert) else self._disk
        tier.read(expert, row_B)

    def host_row(self, expert: ExpertId) -> Tensor | None:
        return self._host.host_row(expert)

    def close(self) -> None:
        """Closes both tiers; idempotent."""
        self._host.close()
        self._disk.close()
