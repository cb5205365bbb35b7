"""DeepSeek's fp8: e4m3 with a scale for every 128 x 128 block. Source: README_WEIGHTS.md of DeepSeek-V3.

``W[n, d] = weight[n, d] * weight_scale_inv[n // 128, d // 128]``, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from duoserve.experts.formats.codes import Codes, Part, RowsAsTheyAre, StoredRows, StoredTensor, WeightFormat
from duoserve.kernels.weights import FP8_BLOCK, ExpertFormat

# DeepSeek's scales are float32; other publishers round them to bfloat16, or to powers of two of one byte.
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


class Fp8(WeightFormat):
    """``weight`` [N, D] and ``weight_scale_inv`` [N / 128, D / 128], whose sizes are rounded up."""

    def parts(self, name: str, num_rows: int, inner: int) -> dict[str, Part]:
        blocks = (-(-num_rows // FP8_BLOCK), -(-inner // FP8_BLOCK))
        return {
            "data": Part(name, StoredTensor((num_rows, inner), (torch.float8_e4m3fn,))),
            "scales": Part(f"{name}_scale_inv", StoredTensor(blocks, SCALE_DTYPES)),
        }

    def codes(self, data: StoredRows, parts: Mapping[str, Tensor]) -> Codes:
        return Codes(ExpertFormat.FP8, FP8_BLOCK, RowsAsTheyAre(data), parts["scales"].float())
