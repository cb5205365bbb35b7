"""What a machine reaches and what a model's layers ask of it: the numbers that a replay's clock runs by.

Links are measured figures of pinned copies, memory and FLOP/s are the makers' peaks; nothing here was measured by this
project. Seconds, bytes, FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from duoserve.errors import ConfigError

Card = TypeVar("Card")


@dataclass(frozen=True)
class Hardware:
    """A device and its link. ``link`` and ``memory`` are bytes/s, ``flops`` those of bf16 matrix products.

    ``copy_latency_s`` passes before each copy, ``layer_overhead_s`` with each layer, whatever it computes.
    ``host_computes``: the host waits for its own work, as a CPU does; else it runs ahead up to the next router.
    """

    name: str
    link: float
    memory: float
    flops: float
    copy_latency_s: float = 10e-6
    layer_overhead_s: float = 50e-6
    host_computes: bool = False

    def copy_s(self, nbytes: int) -> float:
        """A copy of ``nbytes`` over the idle link."""
        return self.copy_latency_s + nbytes / self.link

    def product_s(self, nbytes: float, flops: float) -> float:
        """Reading ``nbytes`` of weights and computing with them, whichever takes longer."""
        return max(nbytes / self.memory, flops / self.flops)


PCIE3, PCIE4, PCIE5 = 12e9, 25e9, 50e9
HARDWARE = {
    card.name: card
    for card in (
        Hardware("pcie3", PCIE3, 1008e9, 165e12),
        Hardware("pcie4", PCIE4, 1008e9, 165e12),
        Hardware("pcie5", PCIE5, 1008e9, 165e12),
        Hardware("a5000", PCIE4, 768e9, 111e12),
        Hardware("a6000", PCIE4, 768e9, 155e12),
        Hardware("rtx3090", PCIE4, 936e9, 71e12),
        Hardware("rtx4090", PCIE4, 1008e9, 165e12),
        Hardware("rtx5090", PCIE5, 1792e9, 209e12),
        Hardware("h100", PCIE5, 3350e9, 989e12),
    )
}


@dataclass(frozen=True)
class LayerSizes:
    """What one MoE layer reads and computes.

    ``expert_params`` are stored in ``expert_bits`` each, scales included; the ``other_params`` (attention, norms,
    router) in two bytes. Attention scores are two products of width ``attention_width``.
    """

    name: str
    expert_params: int
    expert_bits: float
    other_params: int
    attention_width: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert on the link and in a slot."""
        return int(self.expert_params * self.expert_bits / 8)


def _gqa(hidden: int, heads: int, kv_heads: int, head_dim: int, experts: int) -> int:
    """Parameters of attention and router."""
    return 2 * hidden * (heads + kv_heads) * head_dim + hidden * experts


INT4 = 4.25  # groups of 128 with a scale and a zero-point
SIZES = {
    card.name: card
    for card in (
        LayerSizes("mixtral-8x7b", 3 * 4096 * 14336, INT4, _gqa(4096, 32, 8, 128, 8), 4096),
        LayerSizes("mixtral-8x22b", 3 * 6144 * 16384, INT4, _gqa(6144, 48, 8, 128, 8), 6144),
        LayerSizes("qwen3-30b-a3b", 3 * 2048 * 768, 8.0, _gqa(2048, 32, 4, 128, 128), 4096),
        LayerSizes("gpt-oss-120b", 3 * 2880 * 2880, INT4, _gqa(2880, 64, 8, 64, 128), 4096),
        LayerSizes("gpt-oss-20b", 3 * 2880 * 2880, INT4, _gqa(2880, 64, 8, 64, 32), 4096),
        LayerSizes("deepseek-v2-lite", 3 * 2048 * 1408, INT4, 2048 * (16 * 192 + 576 + 2048) + 512 * 16 * 256, 2048),
    )
}


@dataclass(frozen=True)
class Machine:
    """A model on a device: how long its parts take."""

    hardware: Hardware
    sizes: LayerSizes

    def attention_s(self, tokens: int, context: int) -> float:
        """One layer up to the router's choice, for ``tokens`` new tokens behind ``context`` others."""
        seen = tokens * (context + tokens / 2)
        flops = 2 * tokens * self.sizes.other_params + 4 * seen * self.sizes.attention_width
        return self.hardware.layer_overhead_s + self.hardware.product_s(2 * self.sizes.other_params, flops)

    def expert_s(self, tokens: int) -> float:
        """One expert for ``tokens`` of them."""
        return self.hardware.product_s(self.sizes.expert_bytes, 2 * tokens * self.sizes.expert_params)

    @cached_property
    def one_token_s(self) -> float:
        """One expert for one token."""
        return self.expert_s(1)


def find_hardware(name: str) -> Hardware:
    """The card of that name; ConfigError with the names there are for any other."""
    return _find(HARDWARE, name, "hardware")


def find_sizes(name: str) -> LayerSizes:
    """The sizes of the model of that name; ConfigError with the names there are for any other."""
    return _find(SIZES, name, "model")


def _find(cards: dict[str, Card], name: str, kind: str) -> Card:
    if name not in cards:
        raise ConfigError(f"{kind} {name!r} is not known: use one of {', '.join(cards)}")
    return cards[name]
