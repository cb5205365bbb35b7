"""The routed layers that the kernel bench times, the least time they can take, and what is asked of them.

E experts, K top-k, T tokens. A layer's floor is the larger of two times: its bytes over the rate of a copy in device
memory, and its floating-point operations over the rate of a large matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duoserve.experts.layout import ExpertLayout
from duoserve.kernels.weights import ExpertFormat, QuantizedLayout

INT4_GROUP = 128
DECODE_TOKENS = (1, 4, 16)


@dataclass(frozen=True)
class MoEShape:
    """One layer's routed experts, in elements."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def layout(self, format: str) -> ExpertLayout | QuantizedLayout:
        """The bytes of an expert: ``format`` is bf16, bf12, fp8 (128 x 128 blocks) or int4 (groups of 128)."""
        if format == "bf16":
            return ExpertLayout(torch.bfloat16, self.hidden, self.intermediate)
        group = INT4_GROUP if format == "int4" else 0
        return QuantizedLayout(ExpertFormat(format), self.hidden, self.intermediate, group)

    def expert_bytes(self, format: str) -> int:
        """What a step must read of one expert, scales included."""
        return self.layout(format).slot_bytes

    def mean_experts(self, tokens: int) -> float:
        """Distinct experts that ``tokens`` tokens with even routing use: ``E (1 - (1 - K / E)^T)``."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def flop(self, tokens: int) -> int:
        """Floating-point operations of the three products of all routed rows."""
        return 6 * self.hidden * self.intermediate * self.top_k * tokens


QWEN3 = MoEShape("Qwen3-30B-A3B", 2048, 768, 128, 8)
MIXTRAL = MoEShape("Mixtral-8x7B", 4096, 14336, 8, 2)
DEEPSEEK = MoEShape("DeepSeek-V2-Lite", 2048, 1408, 64, 6)
SHAPES = {shape.name: shape for shape in (QWEN3, MIXTRAL, DEEPSEEK)}


def small(shape: MoEShape) -> MoEShape:
    """The same routing over experts so small that ``--quick`` takes seconds."""
    return MoEShape(shape.name, 256, 128, min(shape.experts, 16), shape.top_k)


@dataclass(frozen=True)
class Rates:
    """What the machine can do at most: bytes (read and written ones alike) and bf16 operations a second."""

    bytes_per_s: float
    flop_per_s: float

    def floor_us(self, nbytes: float, flop: float) -> float:
        """Microseconds below which no kernel gets that must move and compute so much."""
        return 1e6 * max(nbytes / self.bytes_per_s, flop / self.flop_per_s)


# Measured on an H100 80GB HBM3 with PyTorch 2.11: a large device-to-device copy and an 8192^3 bf16 product.
H100 = Rates(3.0e12, 798e12)


@dataclass(frozen=True)
class LayerCase:
    """One line of the table: a routed layer with ``tokens``; ``target_us`` is asked on an H100, None: nothing is."""

    shape: MoEShape
    format: str
    tokens: int
    target_us: float | None = None
    published: str = ""

    @property
    def name(self) -> str:
        """As it stands in the report."""
        return f"{self.shape.name} {self.format}, {self.tokens} token{'s' if self.tokens > 1 else ''}"

    @property
    def is_prefill(self) -> bool:
        """Bound by arithmetic, and so held against the rate of the matrix product."""
        return self.tokens > max(DECODE_TOKENS)

    def expected_floor_us(self, rates: Rates) -> float:
        """The floor under even routing."""
        nbytes = self.shape.mean_experts(self.tokens) * self.shape.expert_bytes(self.format)
        return rates.floor_us(nbytes, self.shape.flop(self.tokens))


def _decode(
    shape: MoEShape, format: str, targets: tuple[float | None, ...], published: tuple[str, ...] = ("", "", "")
) -> list[LayerCase]:
    return [
        LayerCase(shape, format, tokens, target, best)
        for tokens, target, best in zip(DECODE_TOKENS, targets, published, strict=True)
    ]


# vLLM's share of the floor for Mixtral in bf16 is published as 82, 91 and 98 %.
CASES = [
    *_decode(QWEN3, "bf16", (31, 102, 280)),
    *_decode(QWEN3, "fp8", (18, 54, 148), ("vLLM 40.4", "vLLM 78.1", "vLLM 164.6")),
    *_decode(QWEN3, "int4", (12, None, 85)),
    *_decode(MIXTRAL, "bf16", (252, 680, 985), ("vLLM 82 % of floor", "vLLM 91 % of floor", "vLLM 98 % of floor")),
    *_decode(MIXTRAL, "int4", (78, None, 280), ("Marlin 134", "", "Marlin 444")),
    *_decode(DEEPSEEK, "bf16", (41, None, 318)),
    *_decode(QWEN3, "bf12", (None, None, None)),
    *_decode(MIXTRAL, "bf12", (None, None, None)),
    LayerCase(MIXTRAL, "bf16", 8192, 10500),
    LayerCase(QWEN3, "bf16", 32768, 5500, "torch grouped_mm 10200"),
    LayerCase(MIXTRAL, "int4", 8192, 15000, "Marlin 254 TFLOP/s"),
]
