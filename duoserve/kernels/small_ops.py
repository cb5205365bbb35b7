"""What a model asks of the ops between its products. Letters as in ``reference_small.py``, which says what they do."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SmallOps(Protocol):
    """``kernels`` has them for every device."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(
        self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

    def rope_write_kv(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cos_T1R: Tensor,
        sin_T1R: Tensor,
        k_pages_PSGD: Tensor,
        v_pages_PSGD: Tensor,
        rows_T: Tensor,
        interleaved: bool = False,
    ) -> Tensor: ...

    def moe_combine(self, y_TKH: Tensor, topk_weights_TK: Tensor, shared_TH: Tensor | None = None) -> Tensor: ...
