"""Rows of host memory where experts without a slot wait, and which the device reads by itself.

E experts of one layer, S slots, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_tensor, require
from duoserve.kernels.weights import ExpertWeights

ROW_ALIGNMENT = 16  # bytes that one thread moves at a time


@dataclass(frozen=True)
class HostRows:
    """A layer's experts in host memory, as tensors and as the addresses by which kernels read them.

    ``rows_E`` has each expert's uint8 row [B], laid out as a slot is, or None if the host has none; ``addresses_E``
    (int64, on the device) has their addresses, 0 for None. A kernel takes no tensor of another device, and PyTorch
    follows no address, so both are needed; here they agree, and the memory stays alive.
    """

    rows_E: tuple[Tensor | None, ...]
    addresses_E: Tensor

    @classmethod
    def of(cls, rows_E: Sequence[Tensor | None], device: torch.device | str) -> HostRows:
        """``rows_E`` for kernels on ``device``.

        Raises KernelError unless they have one length, are aligned to 16 bytes and, for a GPU, pinned.
        """
        rows = {expert: row_B for expert, row_B in enumerate(rows_E) if row_B is not None}
        sizes = {row_B.numel() for row_B in rows.values()}
        require(len(sizes) <= 1, f"the rows have different lengths: {sorted(sizes)} bytes")
        for expert, row_B in rows.items():
            _check_row(f"the row of expert {expert}", row_B, torch.device(device))
        addresses = [0 if row_B is None else row_B.data_ptr() for row_B in rows_E]
        return cls(tuple(rows_E), torch.tensor(addresses, dtype=torch.int64, device=device))

    @property
    def row_bytes(self) -> int | None:
        """B, or None if the host has no row at all."""
        return next((row_B.numel() for row_B in self.rows_E if row_B is not None), None)


def offset_in_row(part: Tensor, weights: ExpertWeights) -> int:
    """The byte of a row at which ``part`` begins; it is one of the matrices, scales or zero-points of ``weights``."""
    return _byte_offset(part) - _byte_offset(weights.w13_SNH)


def check_addresses(source: HostRows) -> None:
    """Raises KernelError unless the table that kernels read has one address for each expert."""
    check_tensor("addresses_E", source.addresses_E, (len(source.rows_E),), (torch.int64,))
    check_contiguous(addresses_E=source.addresses_E)


def _byte_offset(view: Tensor) -> int:
    return int(view.storage_offset()) * view.element_size()


def _check_row(name: str, row_B: Tensor, device: torch.device) -> None:
    check_tensor(name, row_B, (None,), (torch.uint8,))
    require(row_B.device.type == "cpu", f"{name} is on {row_B.device}, not on the host")
    require(row_B.is_contiguous(), f"{name} has gaps; its stride is {row_B.stride(0)}")
    aligned = row_B.data_ptr() % ROW_ALIGNMENT == row_B.numel() % ROW_ALIGNMENT == 0
    require(aligned, f"{name} does not begin and end on {ROW_ALIGNMENT} bytes")
    require(device.type != "cuda" or row_B.is_pinned(), f"{name} is not pinned, so {device} cannot read it")
