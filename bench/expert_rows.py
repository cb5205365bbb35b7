"""The experts of a layer for training on a CPU: one pass over the experts, each with the rows that chose it.

Several times as fast as transformers' own implementations where experts are many and small, for what is computed on
stays in the cache, and each gradient is written once. Shapes: T tokens, H hidden, I expert intermediate, E experts,
K top-k, N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "rows"


def rows_by_expert(ids_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that was chosen, with the places in ``ids_TK.flatten()`` that chose it."""
    order = ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(ids_TK.flatten(), minlength=num_experts).tolist()
    for expert, chosen in enumerate(order.split(counts)):
        if len(chosen):
            yield expert, chosen


class ExpertRows(torch.autograd.Function):
    """out_T = the sum over k of weights_TK * down(silu(gate(x_T)) * up(x_T)); ``w13_EJH``: gate rows, then up rows."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 (they are autograd's)
        ctx: Any, x_TH: Tensor, w13_EJH: Tensor, w2_EHI: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        top_k, weights = ids_TK.shape[1], weights_TK.flatten()
        out_TH, halves = torch.zeros_like(x_TH), []
        for expert, chosen in rows_by_expert(ids_TK, len(w13_EJH)):
            rows = chosen // top_k
            gate_up_NJ = x_TH.index_select(0, rows) @ w13_EJH[expert].T
            gate_NI, up_NI = gate_up_NJ.chunk(2, dim=-1)
            act_NI = F.silu(gate_NI).mul_(up_NI).mul_(weights.index_select(0, chosen)[:, None])
            out_TH.index_add_(0, rows, act_NI @ w2_EHI[expert].T)
            halves.append((expert, chosen, gate_up_NJ))
        ctx.save_for_backward(x_TH, w13_EJH, w2_EHI, weights_TK)
        ctx.halves = halves
        return out_TH

    @staticmethod
    def backward(ctx: Any, d_out_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, w13_EJH, w2_EHI, weights_TK = ctx.saved_tensors
        top_k, weights = weights_TK.shape[1], weights_TK.flatten()
        d_x_TH, d_w13_EJH, d_w2_EHI = torch.zeros_like(x_TH), torch.zeros_like(w13_EJH), torch.zeros_like(w2_EHI)
        d_weights = torch.zeros_like(weights)
        for expert, chosen, gate_up_NJ in ctx.halves:
            rows, weights_N1 = chosen // top_k, weights.index_select(0, chosen)[:, None]
            gate_NI, up_NI = gate_up_NJ.chunk(2, dim=-1)
            sigmoid_NI = gate_NI.sigmoid()
            silu_NI = gate_NI * sigmoid_NI
            act_NI = silu_NI * up_NI
            d_out_NH = d_out_TH.index_select(0, rows)
            d_act_NI = d_out_NH @ w2_EHI[expert]
            torch.mm(d_out_NH.T, act_NI * weights_N1, out=d_w2_EHI[expert])
            d_weights.index_copy_(0, chosen, (d_act_NI * act_NI).sum(-1))
            d_act_NI.mul_(weights_N1)
            # silu' = sigmoid + silu * (1 - sigmoid)
            d_gate_NI = torch.addcmul(sigmoid_NI, silu_NI, 1 - sigmoid_NI).mul_(up_NI).mul_(d_act_NI)
            d_gate_up_NJ = torch.cat([d_gate_NI, d_act_NI.mul_(silu_NI)], dim=-1)
            torch.mm(d_gate_up_NJ.T, x_TH.index_select(0, rows), out=d_w13_EJH[expert])
            d_x_TH.index_add_(0, rows, d_gate_up_NJ @ w13_EJH[expert])
        return d_x_TH, d_w13_EJH, d_w2_EHI, None, d_weights.view_as(weights_TK)


def experts_forward(experts: nn.Module, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What a transformers experts module calls when its config names this implementation."""
    return ExpertRows.apply(x_TH, experts.gate_up_proj, experts.down_proj, ids_TK, weights_TK)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
