"""Rows that are already there, for what else reads them from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from duoserve.experts.formats.codes import StoredRows


@dataclass(frozen=True)
class TensorRows(StoredRows):
    """Those of a tensor."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.tensor[rows]

    def copy_to(self, out_NB: Tensor) -> None:
        out_NB.copy_(self.tensor.view(out_NB.dtype).flatten(1))
