"""How fast machines are and how much a model's layers ask of them: the numbers that a replay's clock runs by.

Links are measured figures of pinned copies, memory and FLOP/s are the makers' peaks; nothing here was measured by this
project. The latency of a copy and the overhead of a layer are assumed. Seconds, bytes, FLOPs.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import inf

from duoserve.errors import ConfigError
from duoserve.replaying.virtual_readers import Readers

# From pinned RAM to a device: what others have measured, with 16 lanes and with 8; 3.0 and 5.0 x8 are half of x16.
PCIE3, PCIE4, PCIE5 = 12e9, 25e9, 50e9
PCIE3_X8, PCIE4_X8, PCIE5_X8 = 6e9, 11.8e9, 25e9
LINKS = {
    "pcie3x16": PCIE3,
    "pcie4x16": PCIE4,
    "pcie5x16": PCIE5,
    "pcie3x8": PCIE3_X8,
    "pcie4x8": PCIE4_X8,
    "pcie5x8": PCIE5_X8,
}
# Sequential reads: the buses' payload, of which the makers promise nearly all.
DISKS = {"sata": 0.55e9, "nvme3": 3.5e9, "nvme4": 7e9, "nvme5": 14e9}
GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """A device and its link. ``link`` and ``memory`` are bytes/s, ``flops`` those of bf16 matrix products.

    ``copy_latency_s`` passes before each copy, ``layer_overhead_s`` with each layer, whatever it computes.
    ``host_computes``: the host waits for its own work, as a CPU does; else it runs ahead up to the next router.
    ``memory_bytes`` and ``host_bytes`` are the sizes of the device's memory and of the RAM behind it (on a CPU all is
    RAM), ``disk`` the bytes/s of what lies behind that, of which one read alone gets ``reader``.
    ``expert_overhead_s`` passes with each expert that is computed. ``widening`` are the bytes/s at which weights are
    made ready for products of several rows, where that takes a pass of its own, as on a CPU. ``readers`` are the copy
    threads of a host that computes, where they were measured; else one copy after another has all of ``link``.
    """

    name: str
    link: float
    memory: float
    flops: float
    copy_latency_s: float = 10e-6
    layer_overhead_s: float = 50e-6
    _: KW_ONLY
    host_computes: bool = False
    memory_bytes: int = 24 * GIB
    host_bytes: int = 64 * GIB
    disk: float = DISKS["nvme4"]
    reader: float = inf
    expert_overhead_s: float = 0.0
    widening: float = inf
    readers: Readers | None = None

    def copy_s(self, nbytes: int) -> float:
        """A copy of ``nbytes`` over the idle link."""
        return self.copy_latency_s + nbytes / self.link

    def product_s(self, nbytes: float, flops: float, rows: float = 1) -> float:
        """Reading ``nbytes`` of weights and multiplying ``rows`` with them, whichever takes longer."""
        ready_s = nbytes / self.widening if rows > 1 else 0.0
        return max(nbytes / self.memory, ready_s + flops / self.flops)


def _cpu(name: str, megatransfers: int, cores: int, gigahertz: float, disk: str) -> Hardware:
    """Two channels of DDR, 8 bytes each; two FMAs of 8 floats a cycle. Copies read and write, so they have half."""
    memory = 2 * 8 * megatransfers * 1e6
    flops = cores * gigahertz * 1e9 * 2 * 2 * 8
    return Hardware(
        name,
        link=memory / 2,
        memory=memory,
        flops=flops,
        copy_latency_s=1e-4,
        layer_overhead_s=1e-4,
        host_computes=True,
        memory_bytes=32 * GIB,
        host_bytes=0,
        disk=DISKS[disk],
    )


# FLOP/s are dense, with sums in float32; on GeForce cards that is twice the rate without matrix units.
HARDWARE = {
    card.name: card
    for card in (
        Hardware("pcie3", PCIE3, 1008e9, 165e12),
        Hardware("pcie4", PCIE4, 1008e9, 165e12),
        Hardware("pcie5", PCIE5, 1008e9, 165e12),
        Hardware("rtx3060", PCIE4, 360e9, 25e12, memory_bytes=12 * GIB),
        Hardware("rtx3090", PCIE4, 936e9, 71e12, memory_bytes=24 * GIB),
        Hardware("rtx4060ti", PCIE4_X8, 288e9, 44e12, memory_bytes=16 * GIB),
        Hardware("rtx4070", PCIE4, 504e9, 58e12, memory_bytes=12 * GIB),
        Hardware("rtx4080", PCIE4, 717e9, 97e12, memory_bytes=16 * GIB),
        Hardware("rtx4090", PCIE4, 1008e9, 165e12, memory_bytes=24 * GIB),
        Hardware("rtx5090", PCIE5, 1792e9, 209e12, memory_bytes=32 * GIB),
        Hardware("a5000", PCIE4, 768e9, 111e12, memory_bytes=24 * GIB),
        Hardware("a6000", PCIE4, 768e9, 155e12, memory_bytes=48 * GIB),
        Hardware("l4", PCIE4, 300e9, 121e12, memory_bytes=24 * GIB),
        Hardware("a100-40", PCIE4, 1555e9, 312e12, memory_bytes=40 * GIB),
        Hardware("a100-80", PCIE4, 1935e9, 312e12, memory_bytes=80 * GIB),
        Hardware("h100", PCIE5, 3350e9, 989e12, memory_bytes=80 * GIB),
        Hardware("h200", PCIE5, 4800e9, 989e12, memory_bytes=141 * 10**9),
        _cpu("ddr4", 3200, 8, 3.5, "nvme3"),
        _cpu("ddr5", 5600, 8, 4.5, "nvme4"),
    )
}


@dataclass(frozen=True)
class LayerSizes:
    """What one MoE layer reads and computes.

    ``expert_params`` are stored in ``expert_bits`` each, scales included; the ``other_params`` (attention, norms,
    router, shared experts) in ``other_bits``. Attention scores are two products of width ``attention_width``.
    """

    name: str
    expert_params: int
    expert_bits: float
    other_params: int
    attention_width: int
    other_bits: int = 16

    @property
    def other_bytes(self) -> int:
        """Bytes of what every token reads of a layer."""
        return self.other_params * self.other_bits // 8

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, on the link and in a slot."""
        return int(self.expert_params * self.expert_bits / 8)


@dataclass(frozen=True)
class Machine:
    """How long the parts of a model take on a device, by formula. What the formulas leave out takes no time.

    ``bench/reality/timed_machine.py`` has one whose parts were measured, those too that are 0 here.
    """

    hardware: Hardware
    sizes: LayerSizes

    def rest_s(self, tokens: int) -> float:
        """What a pass of ``tokens`` new tokens takes outside of its layers."""
        return 0.0

    def hearing_s(self, tokens: int, lookahead: int) -> float:
        """What it takes to tell a listener of one layer's choice, with scores for ``lookahead`` layers ahead."""
        return 0.0

    @property
    def launch_s(self) -> float:
        """What a batch of experts takes beyond ``expert_s`` of each of them."""
        return 0.0

    def fresh_s(self, tokens: int) -> float:
        """What an expert takes beyond ``expert_s`` the first time after its copy: another core's cache has it."""
        return 0.0

    def cold_s(self, tokens: int) -> float:
        """What an expert takes beyond ``expert_s`` later on: it was used long ago, and no cache has its bytes."""
        return 0.0

    def disturbed_s(self, tokens: int) -> tuple[float, float]:
        """How long computing is held up by each thread that is woken to read beside it, and by each read that ends."""
        return 0.0, 0.0

    def attention_s(self, tokens: int, context: int, sequences: int = 1) -> float:
        """One layer up to the router's choice, for ``tokens`` new tokens, each sequence's behind ``context`` others."""
        flops = self.attention_flops(tokens, context, sequences)
        return self.hardware.layer_overhead_s + self.hardware.product_s(self.sizes.other_bytes, flops, tokens)

    def attention_flops(self, tokens: int, context: int, sequences: int = 1) -> float:
        """FLOPs of ``attention_s``: those of products with weights, and of attention scores."""
        seen = tokens * (context + tokens / sequences / 2)
        return 2 * tokens * self.sizes.other_params + 4 * seen * self.sizes.attention_width

    def expert_s(self, tokens: float) -> float:
        """One expert for ``tokens`` of them."""
        flops = 2 * tokens * self.sizes.expert_params
        return self.hardware.expert_overhead_s + self.hardware.product_s(self.sizes.expert_bytes, flops, tokens)

    @cached_property
    def one_token_s(self) -> float:
        """One expert for one token."""
        return self.expert_s(1)


def find_hardware(name: str) -> Hardware:
    """The card of that name; ConfigError with the names there are for any other."""
    if name not in HARDWARE:
        raise ConfigError(f"hardware {name!r} is not known: use one of {', '.join(HARDWARE)}")
    return HARDWARE[name]
