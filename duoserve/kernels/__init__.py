"""The public ops. Every model computes through these names; only this file decides what runs them.

Operands on a GPU go to Triton, others to the op's twin in PyTorch, whose signature and docstring the op has. With
``DUOSERVE_KERNELS=triton`` all go to Triton, which on a CPU needs its interpreter (``TRITON_INTERPRET=1``). That is
slow, but checks the kernels within a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from duoserve.errors import KernelError
from duoserve.kernels import reference, reference_copies
from duoserve.kernels.host_rows import HostRows
from duoserve.kernels.matmul import Products, batched_product, by_rows, linear, tiles_keep_bits
from duoserve.kernels.paging import context_rows
from duoserve.kernels.reference import apply_rope, attention, rope_frequencies, rope_table
from duoserve.kernels.reference_attention import QUERY_ROWS
from duoserve.kernels.routed_rows import DeviceWork, HostWork, RoutePlan, Work, by_demand
from duoserve.kernels.weights import ClampedUp, ExpertFormat, ExpertWeights

__all__ = [
    "QUERY_ROWS",
    "ClampedUp",
    "DeviceWork",
    "ExpertFormat",
    "ExpertWeights",
    "HostRows",
    "HostWork",
    "Products",
    "RoutePlan",
    "Work",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "batched_product",
    "by_demand",
    "by_rows",
    "context_rows",
    "decode_attention",
    "linear",
    "mla_decode_attention",
    "moe_combine",
    "moe_down",
    "moe_down_fill",
    "moe_experts",
    "moe_gemv_down",
    "moe_gemv_up",
    "moe_up",
    "moe_up_fill",
    "page_gather",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "rope_write_kv",
    "route_plan",
    "router_topk",
    "tiles_keep_bits",
    "write_rows",
]

_Operands = ParamSpec("_Operands")
_Result = TypeVar("_Result")
_TRITON_ON_CPU = os.environ.get("DUOSERVE_KERNELS") == "triton"
_GPU = torch.cuda.is_available()  # without a GPU, operands need not be looked at


def _dispatched(twin: Callable[_Operands, _Result]) -> Callable[_Operands, _Result]:
    """The op of ``twin``'s name: it runs in Triton if its operands are on a GPU, else it is ``twin`` itself."""

    @wraps(twin)
    def op(*operands: _Operands.args, **options: _Operands.kwargs) -> _Result:
        if has_torch_function(operands):  # lets a mode that watches torch's calls see the op as one call
            result: _Result = handle_torch_function(op, operands, *operands, **options)
            return result
        on_gpu = _GPU and any(operand.is_cuda for operand in operands if isinstance(operand, Tensor))
        return (_in_triton(twin) if on_gpu or _TRITON_ON_CPU else twin)(*operands, **options)

    return op


def _in_triton(twin: Callable[_Operands, _Result]) -> Callable[_Operands, _Result]:
    # Triton is an extra. A CPU needs neither it nor the second that its import takes.
    try:
        from duoserve.kernels import triton_ops  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise KernelError("this takes Triton, which is not installed: pip install 'duoserve[triton]'") from error
    kernel: Callable[_Operands, _Result] = getattr(triton_ops, twin.__name__)
    return kernel


route_plan = _dispatched(reference.route_plan)
moe_up = _dispatched(reference.moe_up)
moe_down = _dispatched(reference.moe_down)
moe_experts = _dispatched(reference.moe_experts)
moe_combine = _dispatched(reference.moe_combine)
moe_gemv_up = _dispatched(reference.moe_gemv_up)
moe_gemv_down = _dispatched(reference.moe_gemv_down)
moe_up_fill = _dispatched(reference_copies.moe_up_fill)
moe_down_fill = _dispatched(reference_copies.moe_down_fill)
page_gather = _dispatched(reference_copies.page_gather)
router_topk = _dispatched(reference.router_topk)
rms_norm = _dispatched(reference.rms_norm)
add_rms_norm = _dispatched(reference.add_rms_norm)
rope_write_kv = _dispatched(reference.rope_write_kv)
decode_attention = _dispatched(reference.decode_attention)
mla_decode_attention = _dispatched(reference.mla_decode_attention)
write_rows = _dispatched(reference.write_rows)
