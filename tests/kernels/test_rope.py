"""RoPE with the cache write: Triton and twin against complex rotation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import KernelError
from duoserve.kernels import reference_small as reference
from duoserve.kernels.rope import rope_write_kv
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits, poisoned


def rope_table(positions_T: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of plain RoPE."""
    return reference.rope_table(positions_T, reference.rope_frequencies(rotated, theta), dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Each pair as a complex number times (cos + i sin), in float64."""
    rotated, out = 2 * cos.shape[-1], x.double().clone()
    low = slice(0, rotated, 2) if interleaved else slice(0, rotated // 2)
    high = slice(1, rotated, 2) if interleaved else slice(rotated // 2, rotated)
    turn = torch.complex(cos.double(), sin.double())
    z = torch.complex(x[..., low].double(), x[..., high].double()) * turn
    out[..., low], out[..., high] = z.real, z.imag
    return out


def operands(tokens: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """q, k and v as slices of stacked projections, tables of ``dims[1]`` turned dimensions, poisoned pages, rows."""
    num_heads, num_kv_heads = heads
    head_dim, rotated = dims
    qkv = torch.randn(tokens, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = rope_table(torch.randint(0, 5000, (tokens,), device=DEVICE), rotated, 1e4, dtype)
    pages = [poisoned(3, 5, num_kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    rows = torch.randperm(15, device=DEVICE)[:tokens]
    return {"q_THD": q, "k_TGD": k, "v_TGD": v, "cos_T1R": cos, "sin_T1R": sin} | {
        "k_pages_PSGD": pages[0],
        "v_pages_PSGD": pages[1],
        "rows_T": rows,
    }


@given(
    tokens=st.integers(0, 5),
    heads=st.sampled_from([(4, 4), (6, 2), (9, 1), (1, 1)]),
    dims=st.sampled_from([(64, 64), (96, 96), (128, 128), (64, 32), (40, 10)]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    padding=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_rotates_and_stores(
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    interleaved: bool,
    padding: set[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ours = operands(tokens, heads, dims, dtype)
    for t in padding:
        if t < tokens:
            ours["rows_T"][t] = -1
    twins = {name: tensor.clone() for name, tensor in ours.items()}
    out = rope_write_kv(**ours, interleaved=interleaved)
    twin_out = reference.rope_write_kv(**twins, interleaved=interleaved)
    assert_same_bits(out, twin_out)
    for pages in ("k_pages_PSGD", "v_pages_PSGD"):
        assert_same_bits(ours[pages], twins[pages])

    cos, sin, rows = ours["cos_T1R"], ours["sin_T1R"], ours["rows_T"]
    assert_close(out, turned(ours["q_THD"], cos, sin, interleaved), dtype)
    kept = rows >= 0
    k_flat, v_flat = ours["k_pages_PSGD"].flatten(0, 1), ours["v_pages_PSGD"].flatten(0, 1)
    assert_close(k_flat[rows[kept]], turned(ours["k_TGD"], cos, sin, interleaved)[kept], dtype)
    assert_same_bits(v_flat[rows[kept]], ours["v_TGD"][kept])
    untouched = [row for row in range(15) if row not in rows.tolist()]
    assert bool(k_flat[untouched].isnan().all()) and bool(v_flat[untouched].isnan().all())


def test_dimensions_beyond_the_turned_ones_stay() -> None:
    ours = operands(3, (4, 2), (32, 8), torch.float32)
    out = rope_write_kv(**ours)
    assert_same_bits(out[..., 8:], ours["q_THD"][..., 8:])
    assert_same_bits(ours["k_pages_PSGD"].flatten(0, 1)[ours["rows_T"]][..., 8:], ours["k_TGD"][..., 8:])


def test_rotation_keeps_the_products_of_queries_and_keys_at_equal_distance() -> None:
    """What RoPE is for: q at m times k at n depends on m - n alone."""
    q, k = torch.randn(1, 1, 16, device=DEVICE), torch.randn(1, 1, 16, device=DEVICE)

    def product(m: int, n: int) -> float:
        at = [rope_table(torch.tensor([p], device=DEVICE), 16, 100.0, torch.float32) for p in (m, n)]
        pages = [torch.zeros(1, 1, 1, 16, device=DEVICE) for _ in range(2)]
        row = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        turned_q = rope_write_kv(q, k, k, *at[0], *pages, row)
        rope_write_kv(q, k, k, *at[1], *pages, row)
        return float((turned_q * pages[0][0]).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)


REFUSED = [
    ("k_TGD", lambda k: k[..., :8], r"k has shape \(3, 2, 8\); it must be \[3, any, 16\]"),
    ("v_TGD", lambda v: v.half(), r"v is torch.float16"),
    ("cos_T1R", lambda cos: cos[..., :4].contiguous(), r"sin has shape \(3, 1, 8\); it must be \[3, 1, 4\]"),
    ("rows_T", lambda rows: rows.int(), r"rows is torch.int32; it must be torch.int64"),
    ("k_pages_PSGD", lambda pages: pages[:, :, :1], r"k_pages has shape \(3, 5, 1, 16\)"),
    ("v_pages_PSGD", lambda pages: pages.transpose(0, 1), r"v_pages has shape \(5, 3, 2, 16\)"),
    ("q_THD", lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), r"each head of q must be contiguous"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, change: Any, message: str) -> None:
    ours = operands(3, (4, 2), (16, 16), torch.float32)
    with pytest.raises(KernelError, match=message):
        rope_write_kv(**{**ours, name: change(ours[name])})
