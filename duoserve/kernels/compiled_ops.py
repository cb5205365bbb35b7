"""The small ops of prompts as loops that PyTorch's compiler makes for a CPU, once for all numbers of rows.

Letters as in ``reference_small.py``, whose ops these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast

from torch import Tensor

from duoserve import kernels
from duoserve.kernels.compiler import Compiled, compile_for_rows
from duoserve.kernels.small_ops import SmallOps

_Result = TypeVar("_Result")


class CompiledOps(SmallOps):
    """Each is compiled when it first meets tensors of such dtypes, widths and strides; ``kernels`` has it for one row.

    No row changes the bits of another, which are not quite those of ``kernels``: what was rounded in between is not.
    """

    def __init__(self) -> None:
        self._made: dict[object, Compiled] = {}

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """As in ``kernels``."""
        return self._computed(kernels.rms_norm, [x_TH], [weight_H], eps)

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As in ``kernels``."""
        return self._computed(kernels.add_rms_norm, [x_TH, residual_TH], [weight_H], eps)

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
    ) -> Tensor:
        """As in ``kernels``; rows that are negative must come last."""
        rows = [q_THD, k_TGD, v_TGD, cos_T1R, sin_T1R, rows_T]
        return self._computed(_rope_write_kv, rows, [k_pages_PSGD, v_pages_PSGD], interleaved)

    def moe_combine(self, y_TKH: Tensor, topk_weights_TK: Tensor, shared_TH: Tensor | None = None) -> Tensor:
        """As in ``kernels``."""
        rows = [y_TKH, topk_weights_TK, *([] if shared_TH is None else [shared_TH])]
        return self._computed(kernels.moe_combine, rows, [])

    def _computed(
        self, op: Callable[..., _Result], rows: Sequence[Tensor], others: Sequence[Tensor], *constants: float
    ) -> _Result:
        """``op(*rows, *others, *constants)``; the rows are the first dimension of each of ``rows``."""
        if len(rows[0]) == 1:
            return op(*rows, *others, *constants)
        kinds = [(tensor.dtype, tensor.shape[1:], tensor.stride()) for tensor in rows]
        key = op, constants, *kinds, *[(tensor.dtype, tensor.shape, tensor.stride()) for tensor in others]
        if key not in self._made:
            self._made[key] = compile_for_rows(partial(_with_constants, op, constants), rows, others)
        return cast(_Result, self._made[key](*rows, *others))


def _with_constants(op: Callable[..., _Result], constants: Sequence[float], *tensors: Tensor) -> _Result:
    return op(*tensors, *constants)


def _rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    rows_T: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    interleaved: bool,
) -> Tensor:
    """The op with its rows first."""
    return kernels.rope_write_kv(q_THD, k_TGD, v_TGD, cos_T1R, sin_T1R, k_pages_PSGD, v_pages_PSGD, rows_T, interleaved)
