"""The write of whole rows to the cache: Triton and twin against an index, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import reference_small as reference
from duoserve.kernels.cache_rows import write_rows
from tests.kernels.common import DEVICE, DTYPES, assert_same_bits, poisoned


@given(
    tokens=st.integers(0, 6),
    width=st.sampled_from([1, 20, 576, 1030]),  # the last one takes two programs a row
    dtype=st.sampled_from(DTYPES),
    padding=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_rows_go_to_their_places_and_padding_nowhere(
    tokens: int, width: int, dtype: torch.dtype, padding: set[int], seed: int
) -> None:
    torch.manual_seed(seed)
    values_TW = torch.randn(tokens, width + 3, device=DEVICE).to(dtype)[:, :width]  # part of a wider product
    rows = [-1 if t in padding else row for t, row in enumerate(torch.randperm(15)[:tokens].tolist())]
    rows_T = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    for write in (write_rows, reference.write_rows):
        pages_PSW, expected_NW = poisoned(3, 5, width, dtype=dtype), poisoned(15, width, dtype=dtype)
        for token, row in enumerate(rows):
            if row >= 0:
                expected_NW[row] = values_TW[token]
        write(values_TW, pages_PSW, rows_T)
        assert_same_bits(pages_PSW.flatten(0, 1), expected_NW)


REFUSED = [
    ("values_TW", lambda values: values.int(), "values is torch.int32"),
    ("values_TW", lambda values: values.T.contiguous().T, "each row of values must be contiguous"),
    ("pages_PSW", lambda pages: pages.half(), "pages is torch.float16; it must be torch.float32"),
    ("pages_PSW", lambda pages: pages[..., :8], r"pages has shape \(2, 4, 8\); it must be \[any, any, 16\]"),
    ("pages_PSW", lambda pages: pages.transpose(0, 1), "pages must be contiguous"),
    ("rows_T", lambda rows: rows.int(), "rows is torch.int32; it must be torch.int64"),
    ("rows_T", lambda rows: rows[:2], r"rows has shape \(2,\); it must be \[3\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, change: Any, message: str) -> None:
    operands = {
        "values_TW": torch.randn(3, 16, device=DEVICE),
        "pages_PSW": torch.zeros(2, 4, 16, device=DEVICE),
        "rows_T": torch.arange(3, device=DEVICE),
    }
    with pytest.raises(KernelError, match=message):
        write_rows(**{**operands, name: change(operands[name])})
