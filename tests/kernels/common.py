"""What all kernel tests share: where kernels run, one tolerance per dtype, poisoned memory and a canary slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from duoserve.experts.layout import ExpertLayout
from duoserve.kernels import ExpertWeights
from duoserve.kernels.numerics import interpreting
from duoserve.kernels.weights import QuantizedLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative norm of the error of one op against float64 truth, for results rounded once to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = tuple(TOLERANCE)
INTERPRETED = pytest.mark.skipif(not interpreting(), reason="kernels take a CPU's tensors in the interpreter alone")
POISON = 0xFF  # all bits set: NaN in every float format


def assert_close(ours: Tensor, truth: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Relative norm against the float64 truth; NaN never passes. ``roundings`` to the dtype lie on the way."""
    truth = truth.to(device=ours.device, dtype=torch.float64)
    assert ours.shape == truth.shape, f"{tuple(ours.shape)} is not {tuple(truth.shape)}"
    error = float((ours.double() - truth).norm() / truth.norm().clamp_min(1e-30))
    limit = roundings * TOLERANCE[dtype]
    assert error <= limit, f"relative error {error:.2e} exceeds {limit:.1e} in {dtype}"


def assert_within_one_ulp(ours: Tensor, truth: Tensor) -> None:
    """All but one in a thousand elements of a half type are at most one unit in the last place from float64 truth."""
    info = torch.finfo(ours.dtype)
    binade = truth.double().abs().clamp_min(info.smallest_normal).log2().floor().exp2()
    off = ~((ours.double() - truth.double()).abs() <= info.eps * binade)
    assert int(off.sum()) <= ours.numel() / 1000, f"{int(off.sum())} of {ours.numel()} elements are off by over an ulp"


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Equal in every bit, NaN included."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    same = ours.contiguous().view(torch.uint8) == theirs.contiguous().view(torch.uint8)
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} bytes differ"


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor full of NaN."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


class PoisonedPool:
    """A slot pool full of NaN. ``check()`` fails when a byte has changed since ``keep()``."""

    def __init__(self, num_slots: int, layout: ExpertLayout | QuantizedLayout) -> None:
        self.layout = layout
        self.rows_SB = torch.full((num_slots, layout.slot_bytes), POISON, dtype=torch.uint8, device=DEVICE)
        self.weights: ExpertWeights = layout.weights(self.rows_SB)
        self.keep()

    def keep(self) -> None:
        """What is in the slots now is what must stay there."""
        self._expected_SB = self.rows_SB.clone()

    def check(self) -> None:
        """Every slot, the unused ones above all (the canaries), has the bytes it was given."""
        assert torch.equal(self.rows_SB, self._expected_SB), "a kernel wrote to a slot"
