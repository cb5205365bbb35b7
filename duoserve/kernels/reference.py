"""The PyTorch spec of every op, which is also what runs on a CPU. Imports without triton.

T tokens, K top-k, E experts, S slots, H hidden, I expert intermediate, N = T * K routed rows; in attention H query
heads, G KV heads, D head dimension, C context tokens. Sums are made in at least float32; results come in the input's
dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.matmul import has_native_matmul, linear
from duoserve.kernels.routing import RoutePlan
from duoserve.kernels.weights import ExpertWeights

__all__ = [
    "apply_rope",
    "attention",
    "linear",
    "moe_combine",
    "moe_down",
    "moe_up",
    "rms_norm",
    "rope_table",
    "route_plan",
    "router_topk",
]


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""
    x = x_TH.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_H * normed.to(x_TH.dtype)


def rope_table(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, D/2] of ``position / theta^(2i/D)``, computed in float32, given in ``dtype``."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim)
    angles_TD = positions_T.float()[:, None, None] * inverse
    return angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)


def apply_rope(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotates (x_i, x_{i+D/2}) of every head by its position's angle (Su et al., 2021; the half-split form)."""
    low, high = x_THD.chunk(2, dim=-1)
    return torch.cat((low * cos_T1D - high * sin_T1D, high * cos_T1D + low * sin_T1D), dim=-1)


def attention(q_THD: Tensor, k_CGD: Tensor, v_CGD: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal grouped-query attention of the last T of C positions -> [T, H, D].

    Each position sees itself and what lies before it, at most ``window`` positions in all. Source: Vaswani et al.
    (2017), Ainslie et al. (2023), Beltagy et al. (2020).
    """
    num_new, num_context = len(q_THD), len(k_CGD)
    if window is not None and num_new == 1 and num_context > window:
        k_CGD, v_CGD, num_context = k_CGD[-window:], v_CGD[-window:], window
    windowed = window is not None and num_context > window
    plain_causal = num_new == num_context and not windowed
    mask_TC = None
    if num_new > 1 and not plain_causal:
        mask_TC = _visible(num_new, num_context, window, q_THD.device)
    dtype = q_THD.dtype
    if num_new == 1 and not has_native_matmul(dtype):  # a third of the time of one query in half precision
        q_THD, k_CGD, v_CGD = q_THD.float(), k_CGD.float(), v_CGD.float()
    out_HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_CGD.transpose(0, 1)[None],
        v_CGD.transpose(0, 1)[None],
        attn_mask=mask_TC,
        is_causal=plain_causal and num_new > 1,
        scale=scale,
        enable_gqa=q_THD.shape[1] != k_CGD.shape[1],
    )[0]
    return out_HTD.transpose(0, 1).to(dtype)


def _visible(num_new: int, num_context: int, window: int | None, device: torch.device) -> Tensor:
    """True where query row t may see context column c, [T, C]."""
    age_TC = torch.arange(num_context - num_new, num_context, device=device)[:, None] - torch.arange(
        num_context, device=device
    )
    return (age_TC >= 0) & (age_TC < (window or num_context))


def router_topk(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Mixtral's router: softmax over all experts, top-k, renormalized -> float32 weights [T, K], int64 ids [T, K].

    Source: Jiang et al. (2024). Chosen by descending probability.
    """
    probs_TE = logits_TE.float().softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


def route_plan(topk_ids_TK: Tensor) -> RoutePlan:
    """Sorts the N routed rows stably by expert; see :class:`RoutePlan`."""
    sorted_ids_N, order_N = topk_ids_TK.flatten().sort(stable=True)
    experts, counts = torch.unique_consecutive(sorted_ids_N, return_counts=True)
    starts = (0, *counts.cumsum(0).tolist())
    return RoutePlan(order_N, tuple(experts.tolist()), starts, topk_ids_TK.shape[1])


def moe_up(x_TH: Tensor, weights: ExpertWeights, slot: int, rows_R: Tensor, top_k: int) -> Tensor:
    """``silu(x w1^T) * (x w3^T)`` of one expert's routed rows -> [R, I].

    ``rows_R`` are flat positions ``token * K + j``; the weights' gate and up rows are interleaved.
    """
    x_RH = x_TH if len(x_TH) == len(rows_R) == 1 else x_TH[rows_R // top_k]
    up_RI2 = linear(x_RH, weights.w13_SNH[slot]).view(len(rows_R), -1, 2)
    return F.silu(up_RI2[..., 0]) * up_RI2[..., 1]


def moe_down(act_RI: Tensor, weights: ExpertWeights, slot: int, rows_R: Tensor, y_NH: Tensor) -> None:
    """Writes ``act w2^T`` of one expert, unweighted, to the rows' places in ``y_NH`` [T * K, H]."""
    y_NH[rows_R] = linear(act_RI, weights.w2_SHI[slot])


def moe_combine(y_TKH: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """``sum_j weight_j * y_j`` -> [T, H], in float32 and in the order of j, so that no arrival order shows."""
    out_TH = y_TKH[:, 0].float() * topk_weights_TK[:, :1]
    for j in range(1, y_TKH.shape[1]):
        out_TH = out_TH + y_TKH[:, j].float() * topk_weights_TK[:, j : j + 1]
    return out_TH.to(y_TKH.dtype)
