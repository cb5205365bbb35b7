"""Rotary position embedding: one table of angles serves all layers of a forward pass.

T tokens, F frequencies (half of the rotated dimensions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.architecture import RopeConfig, YarnConfig
from duoserve.kernels import Products


@dataclass(frozen=True)
class Rope:
    """The frequency of each pair of dimensions, and the factor of cosines and sines."""

    frequencies_F: Tensor
    magnitude: float
    products: Products = Products.FASTEST

    @classmethod
    def of(cls, config: RopeConfig, device: torch.device) -> Rope:
        """Plain RoPE, or YaRN's, its frequencies on ``device``."""
        if config.yarn is None:
            return cls(kernels.rope_frequencies(config.dim, config.theta).to(device), 1.0)
        return cls(_yarn_frequencies(config, config.yarn).to(device), config.yarn.magnitude)

    def table(self, positions_T: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, F] in the dtype of ``like``."""
        if self.products is Products.FASTEST:
            return kernels.rope_table(positions_T, self.frequencies_F, like.dtype, self.magnitude)
        rows = [
            kernels.rope_table(at_1, self.frequencies_F, like.dtype, self.magnitude) for at_1 in positions_T[:, None]
        ]
        return torch.cat([cos_11F for cos_11F, _ in rows]), torch.cat([sin_11F for _, sin_11F in rows])


def yarn_magnitude(factor: float, strength: float = 1.0) -> float:
    """The factor by which YaRN lengthens queries and keys for a context ``factor`` times as long (its section 3.4)."""
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_frequencies(config: RopeConfig, yarn: YarnConfig) -> Tensor:
    """YaRN's frequencies: plain, slowed, and in between a mix of both."""
    first, last = (_dimension(turns, config, yarn) for turns in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.dim - 1)
    if first == last:
        last += 0.001
    periods_F = config.theta ** (torch.arange(0, config.dim, 2, dtype=torch.float32, device="cpu") / config.dim)
    places_F = torch.arange(len(periods_F), dtype=torch.float32, device="cpu")
    kept_F = 1 - ((places_F - first) / (last - first)).clamp(0, 1)
    return 1.0 / (yarn.factor * periods_F) * (1 - kept_F) + 1.0 / periods_F * kept_F


def _dimension(turns: float, config: RopeConfig, yarn: YarnConfig) -> float:
    """The pair of dimensions, in general a fraction, that makes ``turns`` turns over the original context."""
    return config.dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
