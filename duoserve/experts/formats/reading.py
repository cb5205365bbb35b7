"""Reads the matrices of a checkpoint that are in a quantized format. N rows of a matrix, D its inner dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from duoserve.architecture import Quantization
from duoserve.errors import CheckpointError
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.formats.awq import Awq
from duoserve.experts.formats.codes import Codes, StoredRows, StoredTensor, WeightFormat
from duoserve.experts.formats.fp8 import Fp8
from duoserve.experts.formats.gptq import Gptq
from duoserve.experts.formats.int4 import Groups
from duoserve.experts.formats.mxfp4 import Mxfp4
from duoserve.experts.formats.scratch import Scratch
from duoserve.experts.pieces import MatrixPiece

DATA = "data"  # the role of the tensor that has a matrix's codes


def format_of(quantization: Quantization) -> WeightFormat:
    """The format of a quantization method."""
    groups = Groups(quantization.group)
    if quantization.method == "awq":
        return Awq(groups)
    if quantization.method == "gptq":
        return Gptq(groups, quantization.less_one, quantization.symmetric, quantization.ordered)
    return Fp8() if quantization.method == "fp8" else Mxfp4()


def stored_piece(form: WeightFormat, piece: MatrixPiece) -> dict[str, StoredTensor]:
    """The tensors, by name, that a piece of an expert lies in; they have all experts of a layer if the piece does."""
    experts = piece.shape[:1] if piece.entry is not None else ()
    parts = form.parts(piece.name, *piece.matrix_shape).values()
    return {name: tensor._replace(shape=(*experts, *tensor.shape)) for name, tensor in parts}


@dataclass(frozen=True)
class _CheckpointRows(StoredRows):
    """Rows that are read when they are asked for, into the scratch memory of their tensor's ``role``."""

    checkpoint: Checkpoint
    name: str
    entry: int | None
    role: str
    scratch: Scratch

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.info(self.name).part(self.entry).shape

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        first, stop, _ = rows.indices(self.shape[0])
        info = self.checkpoint.info(self.name).part(self.entry, (first, stop))
        memory = torch.from_numpy(self.scratch.array(self.role, (info.nbytes,), np.uint8))
        tensor = memory.view(info.dtype).view(info.shape)
        self.checkpoint.read_into(self.name, tensor, self.entry, (first, stop))
        return tensor

    def copy_to(self, out_NB: torch.Tensor) -> None:
        info = self.checkpoint.info(self.name).part(self.entry)
        self.checkpoint.read_into(self.name, out_NB.view(info.dtype).view(info.shape), self.entry)


def read_codes(checkpoint: Checkpoint, form: WeightFormat, piece: MatrixPiece, scratch: Scratch) -> Codes:
    """One matrix of one expert. Raises CheckpointError if a tensor cannot be read, or if its values make no sense.

    Codes are read only when they are written to a row. The rest lies in ``scratch``, valid until its next use.
    """
    stored = {
        role: _CheckpointRows(checkpoint, part.name, piece.entry, role, scratch)
        for role, part in form.parts(piece.name, *piece.matrix_shape).items()
    }
    data = stored.pop(DATA)
    tensors = {role: rows[:] for role, rows in stored.items()}
    try:
        return form.codes(data, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.folder}: {piece.name!r}: {error}") from error


def read_dense(checkpoint: Checkpoint, form: WeightFormat, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix ``name`` [N, D], decoded, in float32. Errors as in ``read_codes``."""
    return read_codes(checkpoint, form, MatrixPiece("down", name, shape), Scratch()).dense()
