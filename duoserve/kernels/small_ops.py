"""The small ops between a layer's products, which a model may get compiled; ``reference_small.py`` specifies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from duoserve import kernels


class SmallOps(NamedTuple):
    """The ops to use, each with the operands that it has in ``kernels``, in their order."""

    rms_norm: Callable[..., Tensor] = kernels.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = kernels.add_rms_norm
    rope_write_kv: Callable[..., Tensor] = kernels.rope_write_kv
    moe_combine: Callable[..., Tensor] = kernels.moe_combine


ON_EVERY_DEVICE = SmallOps()
