"""Small dense layers. T tokens, H hidden, I intermediate, K input features, N output features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from duoserve import kernels
from duoserve.kernels import Products
from duoserve.kernels.small_ops import ON_EVERY_DEVICE, SmallOps
from duoserve.models.tensors import Tensors


@dataclass(frozen=True)
class Linear:
    """``x w^T + bias``."""

    weight_NK: Tensor
    bias_N: Tensor | None = None
    products: Products = Products.FASTEST

    @classmethod
    def load(cls, tensors: Tensors, num_out: int, num_in: int, bias: bool = False) -> Linear:
        """Loads it from ``weight`` and, if it has one, ``bias``."""
        return cls(tensors("weight", num_out, num_in), tensors("bias", num_out) if bias else None)

    @classmethod
    def load_stacked(cls, parts: Sequence[tuple[Tensors, int]], num_in: int, bias: bool = False) -> Linear:
        """Several layers of the same input as one, their outputs side by side. A part is its tensors and ``num_out``.

        All weights are read before any bias: tensors that are read one after another can lie one after another, and
        then are joined without a copy.
        """
        weights = [tensors("weight", num_out, num_in) for tensors, num_out in parts]
        biases = [tensors("bias", num_out) for tensors, num_out in parts] if bias else []
        return cls(_joined(weights), _joined(biases) if biases else None)

    def __call__(self, x_TK: Tensor) -> Tensor:
        return kernels.linear(x_TK, self.weight_NK, self.bias_N, self.products)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All rows in one tensor, without a copy if they lie one after another.

    ``torch.cat`` of a dry run's meta tensors is avoided, as it would load torch's compiler, which takes seconds.
    """
    first, num_rows = parts[0], sum(len(part) for part in parts)
    if _lie_in_a_row(parts):
        return first.as_strided((num_rows, *first.shape[1:]), first.stride())
    whole = first.new_empty(num_rows, *first.shape[1:])
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _lie_in_a_row(parts: Sequence[Tensor]) -> bool:
    if any(part.is_meta or not part.is_contiguous() for part in parts):
        return False
    ends = [part.data_ptr() + part.nbytes for part in parts]
    one_memory = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return one_memory and [part.data_ptr() for part in parts[1:]] == ends[:-1]


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm over the last dimension."""

    weight_H: Tensor
    eps: float
    ops: SmallOps = ON_EVERY_DEVICE

    @classmethod
    def load(cls, tensors: Tensors, size: int, eps: float) -> RMSNorm:
        """Loads the norm from ``weight``."""
        return cls(tensors("weight", size), eps)

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.ops.rms_norm(x_TH, self.weight_H, self.eps)

    def after_adding(self, delta_TH: Tensor | None, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of ``x + delta``, ``x + delta``); a delta of None counts as zero."""
        if delta_TH is None:
            return self(x_TH), x_TH
        return self.ops.add_rms_norm(delta_TH, x_TH, self.weight_H, self.eps)


@dataclass(frozen=True)
class FeedForward:
    """SwiGLU (Shazeer, 2020) for every token: a dense layer, or the expert that all tokens share."""

    gate_up: Linear
    down: Linear

    @classmethod
    def load(cls, tensors: Tensors, hidden: int, intermediate: int) -> FeedForward:
        """Loads the network from ``gate_proj``, ``up_proj`` and ``down_proj``."""
        wide = [(tensors.under(name), intermediate) for name in ("gate_proj", "up_proj")]
        return cls(Linear.load_stacked(wide, hidden), Linear.load(tensors.under("down_proj"), hidden, intermediate))

    def __call__(self, x_TH: Tensor) -> Tensor:
        gate_TI, up_TI = self.gate_up(x_TH).chunk(2, dim=-1)
        return self.down(kernels.by_rows(F.silu, gate_TI, self.gate_up.products) * up_TI)
