"""MXFP4 as gpt-oss has it: e2m1, two in a byte, and a power of two for every 32. Source: OCP Microscaling Formats 1.0.

``W[n, d] = e2m1(blocks[n, d // 32, d % 32 // 2]) * 2^(scales[n, d // 32] - 127)``; an even d is in the low half.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from duoserve.experts.formats.codes import Codes, Part, RowsAsTheyAre, StoredRows, StoredTensor, WeightFormat
from duoserve.kernels.weights import MXFP4_GROUP, ExpertFormat


class Mxfp4(WeightFormat):
    """Tensors of bytes ``_blocks`` [N, D / 32, 16] and ``_scales`` [N, D / 32]."""

    def parts(self, name: str, num_rows: int, inner: int) -> dict[str, Part]:
        groups = inner // MXFP4_GROUP
        byte = (torch.uint8,)
        return {
            "data": Part(f"{name}_blocks", StoredTensor((num_rows, groups, MXFP4_GROUP // 2), byte)),
            "scales": Part(f"{name}_scales", StoredTensor((num_rows, groups), byte)),
        }

    def codes(self, data: StoredRows, parts: Mapping[str, Tensor]) -> Codes:
        return Codes(ExpertFormat.MXFP4, MXFP4_GROUP, RowsAsTheyAre(data), parts["scales"].T)
