"""The PyTorch spec of every op, which is also what runs on a CPU. Imports without triton.

T tokens, K top-k, E experts, S slots, H hidden, I expert intermediate, R = T * K routed rows, J of them of one expert,
N rows of a matrix, D its inner dimension. The small ops and attention have files of their own. Sums are made in at
least float32 (``matmul.py`` has the exception, on CUDA); results have the input's dtype.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.experts_together import experts_together, may_share, shares
from duoserve.kernels.matmul import (
    Products,
    by_rows,
    float_product,
    left_product,
    linear,
    product_of_blocks,
    streams_left,
)
from duoserve.kernels.reference_attention import attention, decode_attention, mla_decode_attention
from duoserve.kernels.reference_codes import code_product, multiplies_codes
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.reference_small import (
    add_rms_norm,
    apply_rope,
    moe_combine,
    rms_norm,
    rope_frequencies,
    rope_table,
    rope_write_kv,
    router_topk,
    write_rows,
)
from duoserve.kernels.routed_rows import HostWork, RoutePlan, Work
from duoserve.kernels.weights import ClampedUp, ExpertFormat, ExpertWeights, Matrix

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "attention",
    "decode_attention",
    "linear",
    "mla_decode_attention",
    "moe_combine",
    "moe_down",
    "moe_experts",
    "moe_gemv_down",
    "moe_gemv_up",
    "moe_up",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "rope_write_kv",
    "route_plan",
    "router_topk",
    "write_rows",
]


def route_plan(topk_ids_TK: Tensor, slots_E: Tensor) -> RoutePlan:
    """Sorts the R routed rows stably by expert and lists the experts by whether they have a slot: see RoutePlan.

    ``topk_ids_TK`` is int32 or int64, ``slots_E`` int32 with -1 for an expert in no slot. An id outside 0..E-1 names
    no expert: its row sorts last and no op computes it.
    """
    num_experts, device = len(slots_E), slots_E.device
    # Lists are many times faster than tensors for the few rows of a decode step, and not slow for a prompt.
    ids = [e if 0 <= e < num_experts else num_experts for e in topk_ids_TK.flatten().tolist()]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    counts = Counter(ids)
    starts = [0, *accumulate(counts[expert] for expert in range(num_experts))]
    slots = slots_E.tolist()
    present = [expert for expert in range(num_experts) if expert in counts]
    resident = [(expert, slots[expert]) for expert in present if slots[expert] >= 0]
    missing = [(expert, -1) for expert in present if slots[expert] < 0]
    return RoutePlan(
        torch.tensor(order, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        HostWork(resident, num_experts, device),
        HostWork(missing, num_experts, device),
        topk_ids_TK.shape[1],
    )


def moe_up(
    x_TH: Tensor,
    weights: ExpertWeights,
    plan: RoutePlan,
    work: Work,
    act_RI: Tensor,
    clamped: ClampedUp | None = None,
) -> None:
    """``silu(x w1^T) * (x w3^T)`` for the rows of each expert in ``work``, into their sorted rows of ``act_RI``.

    The weights' gate and up rows are interleaved; other rows of ``act_RI`` stay as they are. With ``clamped`` its
    formula is applied instead. Source: SwiGLU, Shazeer (2020).
    """
    w13 = weights.w13
    for expert, slot in work.pairs():
        start, stop = plan.rows(expert)
        x_JH, act_JI = _rows_of(x_TH, plan, start, stop), act_RI[start:stop]
        if clamped is None:
            _swiglu(x_JH, w13, slot, act_JI)
        else:
            _clamped(_product(x_JH, w13, slot) + clamped.bias_EN[expert], clamped, w13.products, act_JI)


def moe_down(act_RI: Tensor, weights: ExpertWeights, plan: RoutePlan, work: Work, y_RH: Tensor) -> None:
    """Writes ``act w2^T`` of each expert in ``work``, unweighted, to its rows' places ``token * K + j`` in ``y_RH``."""
    w2 = weights.w2
    for expert, slot in work.pairs():
        start, stop = plan.rows(expert)
        y_JH = _product(act_RI[start:stop], w2, slot)
        if stop - start == 1:
            y_RH[plan.order[start]] = y_JH[0]
        else:
            y_RH.index_copy_(0, plan.places_R[start:stop], y_JH)


def moe_experts(
    x_TH: Tensor,
    weights: ExpertWeights,
    plan: RoutePlan,
    work: Work,
    act_RI: Tensor,
    y_RH: Tensor,
    clamped: ClampedUp | None = None,
) -> None:
    """``moe_up`` and ``moe_down`` of the same experts; ``act_RI`` is scratch, and its contents afterwards undefined.

    A CPU may compute several experts of a few rows together; an expert's bits do not depend on that.
    """
    if clamped is None and may_share(weights, x_TH):
        pairs = work.pairs()
        together = [pair for pair in pairs if shares(plan.rows(pair[0]))]
        experts_together(x_TH, weights, plan, together, y_RH)
        work = HostWork.of(set(pairs) - set(together), x_TH.device)
    moe_up(x_TH, weights, plan, work, act_RI, clamped)
    moe_down(act_RI, weights, plan, work, y_RH)


def moe_gemv_up(x_1H: Tensor, weights: ExpertWeights, slots_K: Tensor, act_KI: Tensor) -> None:
    """``moe_up`` of one token's K experts, which are in ``slots_K`` (int32), into the rows of ``act_KI`` [K, I].

    FLOAT weights only.
    """
    for j, slot in enumerate(slots_K.tolist()):
        _swiglu(x_1H, weights.w13, slot, act_KI[j : j + 1])


def moe_gemv_down(
    act_KI: Tensor,
    weights: ExpertWeights,
    slots_K: Tensor,
    topk_weights_1K: Tensor,
    shared_1H: Tensor | None,
    out_1H: Tensor,
) -> None:
    """``out_1H = sum_j weight_j * act_j w2_j^T + shared`` of one token: ``moe_down`` and ``moe_combine`` in one.

    FLOAT weights only. Triton rounds once at the end; this twin rounds each product too, as the two ops do.
    """
    products = [_product(act_KI[j : j + 1], weights.w2, slot) for j, slot in enumerate(slots_K.tolist())]
    out_1H.copy_(moe_combine(torch.stack(products, dim=1), topk_weights_1K, shared_1H))


def _rows_of(x_TH: Tensor, plan: RoutePlan, start: int, stop: int) -> Tensor:
    """The rows of ``x_TH`` for the sorted rows from ``start`` to before ``stop``."""
    if x_TH.shape[0] == stop - start == 1:
        return x_TH
    return x_TH.index_select(0, plan.tokens_R[start:stop])


def _swiglu(x_JH: Tensor, w13: Matrix, slot: int, act_JI: Tensor) -> None:
    """Writes ``silu(gate) * up`` to ``act_JI``. Gates are made contiguous: a strided silu takes twice the time."""
    product_JN = _product(x_JH, w13, slot, turned=True)
    gate_JI, up_JI = product_JN[:, 0::2], product_JN[:, 1::2]
    if product_JN.is_contiguous():
        gate_JI = by_rows(partial(F.silu, inplace=True), gate_JI.contiguous(), w13.products)
        torch.mul(gate_JI, up_JI, out=act_JI)
    else:  # transposed back last, as each row is contiguous until then
        act_JI.copy_(F.silu(gate_JI.T.contiguous(), inplace=True).mul_(up_JI.T).T)


def _clamped(up_JN: Tensor, clamped: ClampedUp, products: Products, act_JI: Tensor) -> None:
    """Writes the formula of ClampedUp to ``act_JI``, from gate and up columns in turn with the bias added."""
    gate_JI, up_JI = up_JN.view(len(up_JN), -1, 2).unbind(-1)
    gate_JI, up_JI = gate_JI.clamp(max=clamped.limit), up_JI.clamp(-clamped.limit, clamped.limit)
    share_JI = by_rows(torch.sigmoid, gate_JI * clamped.alpha, products)
    torch.mul(up_JI + 1, gate_JI * share_JI, out=act_JI)


def _product(x_JD: Tensor, matrix: Matrix, slot: int, turned: bool = False) -> Tensor:
    """``x w^T`` [J, N]; quantized weights are decoded a block of rows at a time, to float32 whatever ``x_JD`` is.

    Only BF12 is decoded to bfloat16 for a product with bfloat16. ``turned``: J may be contiguous instead of N.
    """
    if x_JD.dtype == matrix.data_SNB.dtype:
        w_ND = matrix.data_SNB[slot]
        if turned and matrix.products is Products.FASTEST and streams_left(w_ND):
            return left_product(x_JD, w_ND)
        return linear(x_JD, w_ND, products=matrix.products)
    num_rows = matrix.data_SNB.shape[1]
    if matrix.format is ExpertFormat.BF12 and x_JD.dtype is torch.bfloat16 and matrix.products is Products.FASTEST:
        blocks = (dense(matrix, slot, block) for block in matrix.blocks)
        return product_of_blocks(x_JD, blocks, num_rows, turned)
    by_codes = matrix.products is Products.FASTEST and multiplies_codes(matrix, x_JD.dtype)
    x_wide_JD = x_JD if by_codes else x_JD.float()
    out_JN = x_JD.new_empty(len(x_JD), num_rows, dtype=torch.float32)
    for block in matrix.blocks:
        if by_codes:
            out_JN[:, block] = code_product(x_JD, matrix, slot, block)
        else:
            out_JN[:, block] = float_product(x_wide_JD, dense(matrix, slot, block).float(), matrix.products)
    return out_JN.to(x_JD.dtype)
