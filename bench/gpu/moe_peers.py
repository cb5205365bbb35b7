"""What others compute a routed bf16 layer with, on the same experts and routing.

T tokens, K top-k, E experts, H hidden, I expert intermediate, R = T * K routed rows.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.moe_operands import Pool, Step

Layer = Callable[[], Tensor]

# Packages with kernels for the same layer, in formats of their own. The bench says whether they are there, no more.
OTHERS = ("moe-ops", "grouped-nf4-gemm")
BATCHED_MM_TOKENS = 16  # it copies a whole expert for every routed row


class PeerWeights:
    """The experts of one layer as others keep them: gate_up [E, 2I, H], gate above up, and down [E, H, I]."""

    def __init__(self, pool: Pool, layer: int) -> None:
        slots = pool.slots_LE[layer].long()
        w13_ENH = pool.weights.w13_SNH[slots]
        self.gate_up_ENH = torch.cat((w13_ENH[:, 0::2], w13_ENH[:, 1::2]), dim=1)
        self.down_EHI = pool.weights.w2_SHI[slots]


def grouped_mm_layer(step: Step, weights: PeerWeights) -> Tensor:
    """Sort, ``F.grouped_mm``, SwiGLU, ``F.grouped_mm``, unsort, weighted sum: torch's own ops, nothing waits."""
    ids_R = step.ids_TK.flatten()
    sorted_ids_R, order_R = ids_R.sort(stable=True)
    experts_E = torch.arange(len(weights.down_EHI), device=ids_R.device)
    ends_E = torch.searchsorted(sorted_ids_R, experts_E, right=True, out_int32=True)
    x_RH = step.x_TH[order_R // step.ids_TK.shape[1]]
    gate, up = F.grouped_mm(x_RH, weights.gate_up_ENH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y_RH = F.grouped_mm(F.silu(gate) * up, weights.down_EHI.transpose(1, 2), offs=ends_E)
    return _combined(y_RH, order_R, step)


def cublas_loop_layer(step: Step, weights: PeerWeights) -> Layer:
    """One cuBLAS product for every expert that has rows, whose numbers the host knows beforehand."""
    order_R = step.ids_TK.flatten().argsort(stable=True)
    counts = step.ids_TK.flatten().bincount(minlength=len(weights.down_EHI)).tolist()
    x_rows_R = order_R // step.ids_TK.shape[1]

    def run() -> Tensor:
        x_RH = step.x_TH[x_rows_R]
        y_RH, start = torch.empty_like(x_RH), 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                gate, up = torch.mm(x_RH[rows], weights.gate_up_ENH[expert].T).chunk(2, dim=-1)
                torch.mm(F.silu(gate) * up, weights.down_EHI[expert].T, out=y_RH[rows])
                start += count
        return _combined(y_RH, order_R, step)

    return run


def _combined(y_RH: Tensor, order_R: Tensor, step: Step) -> Tensor:
    """The sorted rows back in their places, weighted and summed: [T, H]."""
    placed_RH = torch.empty_like(y_RH).index_copy_(0, order_R, y_RH)
    weights_TK1 = step.topk_weights_TK[..., None]
    return (placed_RH.view(*step.ids_TK.shape, -1) * weights_TK1).sum(1).to(y_RH.dtype)


def transformers_experts(step: Step, weights: PeerWeights, implementation: str) -> Any:
    """The experts module of transformers with these weights; ImportError where it is not installed."""
    from transformers import Qwen3MoeConfig  # noqa: PLC0415 (may be missing)
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: PLC0415

    num_experts, hidden, inter = weights.down_EHI.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inter,
        num_experts=num_experts,
        num_experts_per_tok=step.ids_TK.shape[1],
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    state = {"gate_up_proj": weights.gate_up_ENH, "down_proj": weights.down_EHI}
    experts.load_state_dict(state, assign=True)
    return experts.requires_grad_(False)


def peer_names(tokens: int) -> Iterator[str]:
    """The peers that are compared for so many tokens."""
    yield from ("F.grouped_mm", "transformers grouped_mm")
    if tokens <= BATCHED_MM_TOKENS:
        yield "transformers batched_mm"
    yield "cuBLAS loop"


def peer_layer(name: str, step: Step, weights: PeerWeights) -> Layer:
    """A step of one peer, ready to be run or captured."""
    if name == "F.grouped_mm":
        return lambda: grouped_mm_layer(step, weights)
    if name == "cuBLAS loop":
        return cublas_loop_layer(step, weights)
    experts = transformers_experts(step, weights, name.removeprefix("transformers "))
    return lambda: experts(step.x_TH, step.ids_TK, step.topk_weights_TK.to(step.x_TH.dtype))


def others_installed() -> dict[str, str]:
    """What is said of the packages that the bench knows by name only."""
    return {name: _installed(name) for name in OTHERS}


def _installed(name: str) -> str:
    try:
        return f"{importlib.metadata.version(name)} is installed, but this bench has no adapter for it"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
