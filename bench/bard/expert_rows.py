"""The experts of a layer for training on a CPU: one pass over the experts, each with the rows that chose it.

Several times as fast as transformers' own implementations where experts are many and small, for what is computed on
stays in the cache, and each gradient is written once. Shapes: T tokens, H hidden, I expert intermediate, E experts,
K top-k, J rows of one expert, N = 2I rows of ``w13_ENH``.
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
    """out_T = the sum over k of weights_TK * down(silu(gate(x_T)) * up(x_T)); ``w13_ENH``: gate rows, then up rows."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 (they are autograd's)
        ctx: Any, x_TH: Tensor, w13_ENH: Tensor, w2_EHI: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        top_k, weights = ids_TK.shape[1], weights_TK.flatten()
        out_TH, halves = torch.zeros_like(x_TH), []
        for expert, chosen in rows_by_expert(ids_TK, len(w13_ENH)):
            rows = chosen // top_k
            gate_up_JN = x_TH.index_select(0, rows) @ w13_ENH[expert].T
            gate_JI, up_JI = gate_up_JN.chunk(2, dim=-1)
            act_JI = F.silu(gate_JI).mul_(up_JI).mul_(weights.index_select(0, chosen)[:, None])
            out_TH.index_add_(0, rows, act_JI @ w2_EHI[expert].T)
            halves.append((expert, chosen, gate_up_JN))
        ctx.save_for_backward(x_TH, w13_ENH, w2_EHI, weights_TK)
        ctx.halves = halves
        return out_TH

    @staticmethod
    def backward(ctx: Any, d_out_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, w13_ENH, w2_EHI, weights_TK = ctx.saved_tensors
        top_k, weights = weights_TK.shape[1], weights_TK.flatten()
        d_x_TH, d_w13_ENH, d_w2_EHI = torch.zeros_like(x_TH), torch.zeros_like(w13_ENH), torch.zeros_like(w2_EHI)
        d_weights = torch.zeros_like(weights)
        for expert, chosen, gate_up_JN in ctx.halves:
            rows, weights_J1 = chosen // top_k, weights.index_select(0, chosen)[:, None]
            gate_JI, up_JI = gate_up_JN.chunk(2, dim=-1)
            sigmoid_JI = gate_JI.sigmoid()
            silu_JI = gate_JI * sigmoid_JI
            act_JI = silu_JI * up_JI
            d_out_JH = d_out_TH.index_select(0, rows)
            d_act_JI = d_out_JH @ w2_EHI[expert]
            torch.mm(d_out_JH.T, act_JI * weights_J1, out=d_w2_EHI[expert])
            d_weights.index_copy_(0, chosen, (d_act_JI * act_JI).sum(-1))
            d_act_JI.mul_(weights_J1)
            # silu' = sigmoid + silu * (1 - sigmoid)
            d_gate_JI = torch.addcmul(sigmoid_JI, silu_JI, 1 - sigmoid_JI).mul_(up_JI).mul_(d_act_JI)
            d_gate_up_JN = torch.cat([d_gate_JI, d_act_JI.mul_(silu_JI)], dim=-1)
            torch.mm(d_gate_up_JN.T, x_TH.index_select(0, rows), out=d_w13_ENH[expert])
            d_x_TH.index_add_(0, rows, d_gate_up_JN @ w13_ENH[expert])
        return d_x_TH, d_w13_ENH, d_w2_EHI, None, d_weights.view_as(weights_TK)


def experts_forward(experts: nn.Module, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What a transformers experts module calls when its config names this implementation."""
    return ExpertRows.apply(x_TH, experts.gate_up_proj, experts.down_proj, ids_TK, weights_TK)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
