"""The weights of the experts in the slots, as the kernels read them.

S slots, H hidden, I expert intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """Views over the slot pool, addressed by slot.

    ``w13_SNH`` is [S, 2I, H] with gate and up rows interleaved (gate0, up0, gate1, up1, ...); ``w2_SHI`` is
    [S, H, I]. Both are contiguous in their last dimension; the slot stride is the padded size of an expert.
    """

    w13_SNH: Tensor
    w2_SHI: Tensor
