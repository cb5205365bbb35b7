"""The checks of the experts' kernels before a launch: each raises KernelError, which says what is wrong.

T tokens, K top-k, S slots, H hidden, I expert intermediate, R = T * K routed rows, N rows of a matrix, D its inner
dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.routed_rows import RoutePlan, Work
from duoserve.kernels.weights import FP8_BLOCK, INT4_GROUPS, MXFP4_GROUP, ClampedUp, ExpertFormat, ExpertWeights, Matrix

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
STORED = {
    ExpertFormat.FLOAT: FLOATS,
    ExpertFormat.INT8: (torch.int8,),
    ExpertFormat.INT4: (torch.uint8,),
    ExpertFormat.FP8: (torch.uint8,),
    ExpertFormat.MXFP4: (torch.uint8,),
    ExpertFormat.BF12: (torch.uint8,),
}
SCALES = {
    ExpertFormat.INT8: (torch.float32,),
    ExpertFormat.INT4: HALVES,
    ExpertFormat.FP8: (torch.float32,),
    ExpertFormat.MXFP4: (torch.uint8,),
    ExpertFormat.BF12: (torch.float32,),
}


def check_operands(weights: ExpertWeights, plan: RoutePlan, work: Work) -> tuple[int, int]:
    """Checks that weights, plan and work fit each other; returns H and I."""
    for name, tensor in (("order_R", plan.order_R), ("starts_E1", plan.starts_E1), ("experts_W", work.experts_W)):
        check_tensor(name, tensor, (None,), (torch.int32,))
    check_tensor("slots_W", work.slots_W, tuple(work.experts_W.shape), (torch.int32,))
    check_tensor("count_1", work.count_1, (1,), (torch.int32,))
    check_contiguous(order_R=plan.order_R, starts_E1=plan.starts_E1, experts_W=work.experts_W, slots_W=work.slots_W)
    check_one_device(
        weights=weights.w13_SNH,
        order_R=plan.order_R,
        starts_E1=plan.starts_E1,
        slots_W=work.slots_W,
        count=work.count_1,
    )
    return check_weights(weights)


def check_weights(weights: ExpertWeights) -> tuple[int, int]:
    """Checks that both matrices fit each other and the kernels; returns H and I."""
    w13, w2 = weights.w13, weights.w2
    num_slots, two_inter, _ = w13.data_SNB.shape
    hidden, inter = w13.inner, two_inter // 2
    require(weights.order_SH is None, "features in an order of their own have no kernel in Triton yet, only on CPUs")
    require(two_inter % 2 == 0, f"w13_SNH has {two_inter} rows; gate and up rows come in pairs")
    width = weights.format.row_width(inter)
    check_tensor("w2_SHI", w2.data_SNB, (num_slots, hidden, width), (w13.data_SNB.dtype,))
    check_one_device(w13_SNH=w13.data_SNB, w2_SHI=w2.data_SNB)
    _check_matrix("w13_SNH", w13)
    _check_matrix("w2_SHI", w2)
    return hidden, inter


def _check_matrix(name: str, matrix: Matrix) -> None:
    w, scales, zeros = matrix.data_SNB, matrix.scales_SGN, matrix.zeros_SGN
    check_tensor(name, w, (None, None, None), STORED[matrix.format])
    require(w.stride()[1:] == (w.shape[2], 1), f"the rows of {name} must lie one after another in a slot")
    width = matrix.format.row_width(matrix.inner)
    require(w.shape[2] == width, f"a row of {name} has {w.shape[2]} elements, but {matrix.inner} weights take {width}")
    require(w.shape[1] * max(width, matrix.inner) < 2**31, f"an expert's {name} has 2^31 elements or more")
    if matrix.format is ExpertFormat.FLOAT:
        return
    require(scales is not None, f"{name} is {matrix.format.value} and has no scales")
    require((zeros is not None) == (matrix.format is ExpertFormat.INT4), f"{name}: int4 alone has zero-points")
    for part, scale, dtypes in (("scales", scales, SCALES[matrix.format]), ("zero-points", zeros, (torch.uint8,))):
        if scale is not None:
            check_tensor(f"{part} of {name}", scale, (len(w), *_scale_shape(name, matrix)), dtypes)
            require(scale[:1].is_contiguous(), f"the {part} of {name} must be contiguous in a slot")
            check_one_device(**{part: scale, name: w})


def _scale_shape(name: str, matrix: Matrix) -> tuple[int, int]:
    num_rows, inner, group = matrix.data_SNB.shape[1], matrix.inner, matrix.group
    if matrix.format in (ExpertFormat.INT8, ExpertFormat.BF12):
        return 1, num_rows
    if matrix.format is ExpertFormat.FP8:
        rows = 2 * -(-num_rows // 2 // FP8_BLOCK) if matrix.interleaved else -(-num_rows // FP8_BLOCK)
        return rows, -(-inner // FP8_BLOCK)
    groups = INT4_GROUPS if matrix.format is ExpertFormat.INT4 else (MXFP4_GROUP,)
    require(group in groups, f"{name} has groups of {group}; {matrix.format.value} takes {groups}")
    require(inner % group == 0, f"the inner dimension of {name}, {inner}, must be a multiple of its group, {group}")
    return inner // group, num_rows


def check_rows(
    name: str, rows: Tensor, shape: tuple[int, int], weights: ExpertWeights, like: Tensor | None = None
) -> None:
    """Checks a matrix of activations: it goes with ``weights``, and has the dtype of ``like``."""
    dtypes = FLOATS if like is None else (like.dtype,)
    if weights.format is ExpertFormat.FLOAT:
        dtypes = (weights.w13_SNH.dtype,)
    check_tensor(name, rows, shape, dtypes)
    check_contiguous(**{name: rows})
    check_one_device(**{name: rows, "weights": weights.w13_SNH})


def check_clamped(clamped: ClampedUp, weights: ExpertWeights, plan: RoutePlan) -> None:
    """Checks that the bias has an element for each row of w13, for each expert of ``plan``."""
    bias_EN = clamped.bias_EN
    check_tensor("bias_EN", bias_EN, (len(plan.starts_E1) - 1, weights.w13_SNH.shape[1]), FLOATS)
    check_contiguous(bias_EN=bias_EN)
    check_one_device(bias_EN=bias_EN, weights=weights.w13_SNH)


def tma_fits(w: Tensor) -> bool:
    """Whether a tensor descriptor can read ``w``: its address and strides are multiples of 16 bytes."""
    strides = (w.stride(0), w.stride(1))
    return w.data_ptr() % 16 == 0 and all(stride * w.element_size() % 16 == 0 for stride in strides)
