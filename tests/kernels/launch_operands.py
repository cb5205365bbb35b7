"""Operands of the experts' kernels, of Qwen3-30B-A3B's shapes, for launches that are compiled and not run.

T tokens, K top-k, E experts, S slots, H hidden, I expert intermediate.
"""

from __future__ import annotations

import torch

from duoserve.experts.layout import ExpertLayout
from duoserve.kernels import ClampedUp, DeviceWork, ExpertWeights, RoutePlan
from duoserve.kernels.weights import ExpertFormat, QuantizedLayout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NUM_SLOTS = 64
TOP_K, EXPERTS = 8, 128  # Qwen3-30B-A3B, as are the sizes


def expert_weights(dtype: torch.dtype, format: ExpertFormat, group: int, hidden: int, inter: int) -> ExpertWeights:
    """A pool of experts whose activations have ``dtype``."""
    is_float = format is ExpertFormat.FLOAT
    layout = ExpertLayout(dtype, hidden, inter) if is_float else QuantizedLayout(format, hidden, inter, group)
    return layout.weights(torch.empty(NUM_SLOTS, layout.slot_bytes, dtype=torch.uint8))


def clamp(wanted: bool, inter: int, experts: int = EXPERTS) -> ClampedUp | None:
    """gpt-oss's activation."""
    return ClampedUp(torch.empty(experts, 2 * inter, dtype=BF16), 1.702, 7.0) if wanted else None


def routing(tokens: int, experts: int = EXPERTS) -> RoutePlan:
    """A plan of TOP_K of so many; no kernel makes it."""
    lists = torch.empty(2, 3, experts, dtype=torch.int32)
    resident, missing = (DeviceWork(chosen, slots, count[:1]) for chosen, slots, count in lists)
    order_R, starts_E1 = (torch.empty(size, dtype=torch.int32) for size in (tokens * TOP_K, experts + 1))
    return RoutePlan(order_R, starts_E1, resident, missing, TOP_K)
