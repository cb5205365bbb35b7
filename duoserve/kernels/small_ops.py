"""The ops between a layer's products, as a model asks for them; ``reference_small.py`` says what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from duoserve import kernels


class SmallOps(NamedTuple):
    """Each with the operands that it has in ``kernels``, in their order."""

    rms_norm: Callable[..., Tensor] = kernels.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = kernels.add_rms_norm
    rope_write_kv: Callable[..., Tensor] = kernels.rope_write_kv
    moe_combine: Callable[..., Tensor] = kernels.moe_combine


ON_EVERY_DEVICE = SmallOps()
