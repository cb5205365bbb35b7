"""The parts of a checkpoint, and how many experts fit in how much memory, from its config and headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from duoserve.models.described import DescribedModel
from duoserve.models.stored import expert_layout, stored_experts

EXPERTS, OTHER = "experts", "other"
# The first of these words in a tensor's name says which part it belongs to; checkpoints call a router gate.
PARTS = {
    "embed_tokens": "embeddings",
    "lm_head": "head",
    ".self_attn.": "attention",
    "norm": "norms",
    ".gate.": "router",
    ".router.": "router",
    ".shared_expert": "shared experts",
    ".experts.": "expert biases",
    ".mlp.": "dense layers",
}
ORDER = (
    "embeddings",
    "attention",
    "norms",
    "router",
    "dense layers",
    "shared experts",
    EXPERTS,
    "expert biases",
    "head",
)


@dataclass(frozen=True)
class Fit:
    """How many experts ``memory_bytes`` of slots hold, and which share of all experts (0 to 1) this is."""

    memory_bytes: int
    slots: int
    share: float


@dataclass(frozen=True)
class Inventory:
    """Bytes on disk by part, and ``slot_bytes`` of one expert in a slot, padded. Parameters count elements."""

    bytes_by_part: dict[str, int]
    expert_bytes: int
    slot_bytes: int
    total_experts: int
    active_experts: int
    parameters: int
    active_parameters: int
    fits: list[Fit]


def take_inventory(model: DescribedModel) -> Inventory:
    """Adds up all tensors that the architecture asks for."""
    config = model.config
    stored_in = stored_experts(model.family, config)
    by_part = dict.fromkeys([*ORDER, OTHER], 0)
    for name, nbytes in model.nbytes.items():
        by_part[EXPERTS if name in stored_in else _part(name)] += nbytes
    of_experts = model.family.expert_shapes(config)
    parameters = sum(map(prod, model.family.tensor_shapes(config).values()))
    total, active = len(config.moe_layers) * config.num_experts, len(config.moe_layers) * config.top_k
    per_expert = sum(map(prod, of_experts.values())) // total
    slot_bytes = expert_layout(config, config.dtype).slot_bytes
    return Inventory(
        bytes_by_part={part: nbytes for part, nbytes in by_part.items() if nbytes},
        expert_bytes=by_part[EXPERTS] // total,
        slot_bytes=slot_bytes,
        total_experts=total,
        active_experts=active,
        parameters=parameters,
        active_parameters=parameters - (total - active) * per_expert,
        fits=what_fits(slot_bytes, total, least=min(config.top_k + 1, total)),
    )


def what_fits(slot_bytes: int, total: int, least: int) -> list[Fit]:
    """Fits for the fewest slots that work, the powers of two between, and a slot for every expert."""
    low, high = least * slot_bytes, total * slot_bytes
    between = [1 << n for n in range(low.bit_length(), high.bit_length()) if low < 1 << n < high]
    slots = {nbytes: nbytes // slot_bytes for nbytes in dict.fromkeys((low, *between, high))}
    return [Fit(nbytes, count, count / total) for nbytes, count in slots.items()]


def _part(name: str) -> str:
    return next((part for word, part in PARTS.items() if word in name), OTHER)
