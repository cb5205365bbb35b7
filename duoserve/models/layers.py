"""Small dense layers. T tokens, H hidden."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from duoserve import kernels


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm over the hidden dimension."""

    weight_H: Tensor
    eps: float

    def __call__(self, x_TH: Tensor) -> Tensor:
        return kernels.rms_norm(x_TH, self.weight_H, self.eps)

    def after_adding(self, delta_TH: Tensor | None, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """``x + delta``, normed and as it is; no delta is zero."""
        if delta_TH is None:
            return self(x_TH), x_TH
        return kernels.add_rms_norm(delta_TH, x_TH, self.weight_H, self.eps)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; one table of angles serves all layers of a forward pass."""

    head_dim: int
    theta: float

    def table(self, positions_T: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, D/2] in the dtype of ``like``."""
        return kernels.rope_table(positions_T, self.head_dim, self.theta, like.dtype)
