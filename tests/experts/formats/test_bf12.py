"""BF12: every bit of bfloat16 weights comes back, or they are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import CopyError
from duoserve.experts.formats.bf12 import encode
from duoserve.experts.formats.scratch import Scratch
from duoserve.kernels.bf12 import Bf12Rows, room, row_bytes
from duoserve.kernels.compiled.streamed import streamed_bf12_product

LEAST_NORMAL, SUBNORMAL, LARGEST = 2.0**-126, 2.0**-133, torch.finfo(torch.bfloat16).max


def encoded(w_ND: Tensor) -> Bf12Rows:
    data_NB, scales_N = encode(w_ND.view(torch.uint16).numpy(), Scratch())
    assert data_NB.shape == (len(w_ND), row_bytes(w_ND.shape[1]))
    return Bf12Rows.of(torch.from_numpy(data_NB), torch.from_numpy(scales_N), w_ND.shape[1])


def keeps_every_bit(w_ND: Tensor) -> bool:
    return torch.equal(encoded(w_ND).dense().view(torch.int16), w_ND.view(torch.int16))


def escapes(rows: Bf12Rows) -> list[int]:
    """How many each row has."""
    found: list[int] = (rows.escapes_NC.float() != (128 * rows.scales_N)[:, None]).sum(1).tolist()
    return found


def normal(rows: int, inner: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, inner, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(
    seed=st.integers(0, 2**31),
    inner=st.sampled_from([4, 8, 12, 20, 64, 768, 1028, 4096]),
    exponents=st.lists(st.integers(-100, 100), min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_normal_weights_of_any_size_keep_every_bit(seed: int, inner: int, exponents: list[int]) -> None:
    w_ND = normal(len(exponents), inner, seed)
    assert keeps_every_bit(w_ND * torch.tensor([[2.0**exponent] for exponent in exponents]).bfloat16())


def test_every_sign_mantissa_and_exponent_of_a_window_has_a_code() -> None:
    """Windows with the least exponent that may be, and with the greatest; none of the weights is an escape."""
    for first in (8, 100, 239):
        exponents, halves = torch.arange(first, first + 16), torch.tensor([0, 1 << 15])
        bits = (halves[:, None, None] | exponents[:, None] << 7 | torch.arange(128)).flatten()
        bits = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
        w_ND = bits.to(torch.int16).view(torch.bfloat16).view(1, -1)
        assert keeps_every_bit(w_ND) and escapes(encoded(w_ND)) == [0]
        assert w_ND.unique().numel() == 2 * 16 * 128


@pytest.mark.parametrize("weight", [0.0, -0.0, SUBNORMAL, -LEAST_NORMAL, LARGEST, 1e-9, -1e9])
def test_what_is_outside_a_rows_window_is_an_escape(weight: float) -> None:
    w_ND = normal(5, 64).abs() + 0.5
    w_ND[1, 0] = w_ND[2, 63] = w_ND[3, 30] = w_ND[3, 32] = weight
    assert keeps_every_bit(w_ND)
    assert escapes(encoded(w_ND)) == [0, 1, 1, 2, 0]


def test_a_row_may_use_all_of_its_room_and_no_more() -> None:
    for inner, places in ((64, 4), (1024, 4), (1028, 8), (4096, 16), (14336, 16)):
        assert room(inner) == places
        w_ND = normal(3, inner).abs() + 0.5
        w_ND[1, -places:] = 0
        assert keeps_every_bit(w_ND) and escapes(encoded(w_ND)) == [0, places, 0]
        w_ND[1, 0] = 0
        with pytest.raises(
            CopyError, match=rf"room for {places} weights .* outside 16 exponents, and one has {places + 1}"
        ):
            encoded(w_ND)


def test_the_window_is_where_most_weights_are() -> None:
    """Not at the largest: one weight in the row is far above all others, which are far above one more."""
    w_ND = normal(2, 64).abs() + 0.5
    w_ND[1, 3], w_ND[1, 9] = 1e20, 1e-20
    assert keeps_every_bit(w_ND) and escapes(encoded(w_ND)) == [0, 2]


@pytest.mark.parametrize("column", [64, 32767, -1])
def test_a_place_that_names_no_column_counts_for_nothing(column: int) -> None:
    w_ND = normal(2, 64).abs() + 0.5
    w_ND[0, 5] = w_ND[1, 7] = 0
    rows, x_D = encoded(w_ND), torch.randn(64, generator=torch.Generator().manual_seed(1))
    rows.columns_NC[1, 0] = column
    found_ND = rows.dense()
    assert torch.equal(found_ND[0], w_ND[0]) and found_ND[1, 7] == 128 * rows.scales_N[1]
    torch.testing.assert_close(streamed_bf12_product(rows, x_D), found_ND.float() @ x_D)


def test_rows_of_zeros_keep_their_signs() -> None:
    w_ND = torch.zeros(4, 8, dtype=torch.bfloat16)
    w_ND[1] = -0.0
    w_ND[2, 1::2] = -0.0
    w_ND[3, 5], w_ND[3, 6] = SUBNORMAL, 3.0
    assert keeps_every_bit(w_ND) and escapes(encoded(w_ND)) == [0, 0, 0, 2]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(weight: float) -> None:
    w_ND = normal(3, 64)
    w_ND[1, 2] = weight
    with pytest.raises(CopyError, match="not all weights are finite numbers"):
        encoded(w_ND)


def test_bytes_that_are_not_used_are_zero() -> None:
    """Whatever was in the scratch memory: packs of the same weights are the same."""
    scratch, w_ND = Scratch(), normal(3, 20)
    used = 20 * 3 // 2 + 4 * room(20)
    scratch.array("rows", (3, row_bytes(20)), np.uint8).fill(255)
    data_NB, _ = encode(w_ND.view(torch.uint16).numpy(), scratch)
    assert used < row_bytes(20) and not data_NB[:, used:].any()
