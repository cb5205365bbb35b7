"""``y = x w^T``, whatever the dtype, by the fastest exact route of this machine; a GPU has only one.

T tokens, K input features, N output features; H heads, B rows of one, D its dimension. A CPU makes sums in at least
float32. On CUDA, PyTorch may by default add up the parts of a long sum in half precision in 16 bits. To rule that out,
set ``torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction`` and ``allow_bf16_reduced_precision_reduction``
to False; they belong to the process, and nothing here changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many rows, a product in half precision reads each weight once per row, and memory sets the pace. With more
# it is faster to widen the weights to float32 once (measured on AVX2, which has no units for half precision).
NARROW_ROWS = 6
# CPUs with units for bfloat16 stream a matrix faster as the left operand: 19 GB/s instead of 13 for one row (measured
# on AMX). Up to this many rows that makes up for transposing the result, so that its rows are contiguous.
LEFT_ROWS = 64
# Weights that are widened at a time: 4 MiB of float32 stay in the last-level cache until the product has read them.
WIDEN_ELEMENTS = 1 << 20
# Rows of a float32 product that are computed together: fewer rows, or a remainder, are summed in another order.
TILE_ROWS = 16
ARM_BF16 = "bf16"  # what torch calls it if an ARM core multiplies bfloat16; no such machine was at hand to measure
# Sizes (in, out) that products of a tile are tried with: those of models, with as many outputs as are widened at once.
# From 60 threads on a row's place counts with 769 inputs and 515 outputs, which no model has.
TILE_TRIALS = ((64, 128), (768, 1365), (1536, 682), (2880, 364), (4096, 256), (14336, 73))
# And several tiles: with two threads and AVX-512, sums of some were split among threads.
SHARED_TRIALS = ((769, 515), (1536, 768), (768, 3072))


class Products(Enum):
    """Which rows share a product on a CPU: as many as are fastest, or such that no row changes the bits of another.

    BY_ROW multiplies each row alone, which suits the few rows of a decode step. BY_TILE makes float32 products of whole
    tiles, the last one filled up with zeros, which suits prompts. The two have different bits.
    """

    FASTEST = "fastest"
    BY_ROW = "by row"
    BY_TILE = "by tile"


def power_of_two(most: int) -> int:
    """The largest power of two up to ``most``, at least 1. Most matrices split evenly into blocks of so many rows."""
    return 1 << max(0, most.bit_length() - 1)


@cache
def has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` in hardware."""
    if dtype in (torch.float32, torch.float64):
        return True
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    names = {torch.bfloat16: ("amx_bf16", "avx512_bf16", ARM_BF16), torch.float16: ("amx_fp16", "avx512_fp16")}[dtype]
    return any(capabilities.get(name, False) for name in names)


def linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None, products: Products = Products.FASTEST) -> Tensor:
    """``x_TK @ w_NK.T + bias_N`` -> [T, N] in ``x_TK``'s dtype; the top of this file says what sums are made in.

    The route depends only on T, the dtype and the machine, so equal inputs give equal bits. With ``products`` other
    than FASTEST, on a CPU, a row's bits do not depend on the other rows.
    """
    if products is Products.BY_ROW:
        return torch.cat([linear(x_TK[t : t + 1], w_NK, bias_N) for t in range(len(x_TK))])
    if products is Products.BY_TILE:
        return _rounded(_widened(_filled(x_TK), w_NK, _tile_product)[: len(x_TK)], bias_N, x_TK.dtype)
    if len(x_TK) <= LEFT_ROWS and streams_left(w_NK):
        return left_product(x_TK, w_NK, bias_N).contiguous()
    if x_TK.is_cuda or x_TK.shape[0] <= NARROW_ROWS or has_native_matmul(w_NK.dtype):
        return F.linear(x_TK, w_NK, bias_N)
    return _rounded(widened_product(x_TK, w_NK), bias_N, x_TK.dtype)


@torch.library.custom_op("duoserve::widened_product", mutates_args=())
def widened_product(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """``x_TK @ w_NK.T`` in float32. It is an op, so that a tracer records one call and not each block of weights."""
    return _widened(x_TK, w_NK)


@widened_product.register_fake
def _(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    return x_TK.new_empty(len(x_TK), len(w_NK), dtype=torch.float32)


def streams_left(w_NK: Tensor) -> bool:
    """Whether ``left_product`` is the fastest way to read these weights."""
    return w_NK.dtype is torch.bfloat16 and w_NK.is_cpu and has_native_matmul(torch.bfloat16)


def left_product(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """As ``linear``, computed as ``w x^T``: the result is [T, N] with T contiguous."""
    if len(x_TK) == 1:
        product_N = torch.mv(w_NK, x_TK[0]) if bias_N is None else torch.addmv(bias_N, w_NK, x_TK[0])
        return product_N[None]
    product_NT = torch.mm(w_NK, x_TK.T) if bias_N is None else torch.addmm(bias_N[:, None], w_NK, x_TK.T)
    return product_NT.T


def product_of_blocks(x_TK: Tensor, blocks: Iterable[Tensor], num_out: int, turned: bool = False) -> Tensor:
    """``linear`` with a matrix whose rows come in ``blocks``, each valid until the next is taken -> [T, num_out].

    ``turned``: T may be contiguous instead of the outputs, as in ``left_product``.
    """
    if not x_TK.is_cpu or not streams_left(x_TK) or (len(x_TK) > LEFT_ROWS and not turned):
        return torch.cat([linear(x_TK, w_BK) for w_BK in blocks], dim=1)
    product_NT, start = x_TK.new_empty(num_out, len(x_TK)), 0
    for w_BK in blocks:
        product_BT, start = product_NT[start : start + len(w_BK)], start + len(w_BK)
        if len(x_TK) == 1:
            torch.mv(w_BK, x_TK[0], out=product_BT[:, 0])
        else:
            torch.mm(w_BK, x_TK.T, out=product_BT)
    return product_NT.T if turned else product_NT.T.contiguous()


def float_product(x_TK: Tensor, w_NK: Tensor, products: Products) -> Tensor:
    """``x_TK @ w_NK.T`` -> [T, N], all of them float32."""
    if products is Products.BY_ROW:
        return torch.cat([torch.mm(x_TK[t : t + 1], w_NK.T) for t in range(len(x_TK))])
    if products is Products.BY_TILE:
        filled_TK = _filled(x_TK)
        return _tile_product(filled_TK, w_NK.T, out=filled_TK.new_empty(len(filled_TK), len(w_NK)))[: len(x_TK)]
    return torch.mm(x_TK, w_NK.T)


def by_rows(op: Callable[[Tensor], Tensor], x_TK: Tensor, products: Products) -> Tensor:
    """``op(x_TK)`` for an elementwise op, one row after another unless ``products`` is FASTEST.

    An op that is not rounded exactly, such as an exponential, has other bits in elements at the end of a tensor, or of
    a thread's share, that do not fill a vector.
    """
    if products is Products.FASTEST:
        return op(x_TK)
    return torch.cat([op(x_TK[t : t + 1]) for t in range(len(x_TK))])


def batched_product(x_HBD: Tensor, w_HDN: Tensor, products: Products) -> Tensor:
    """``x_HBD @ w_HDN`` -> [H, B, N], for H heads with B rows and weights each; sums are made as in ``linear``."""
    if products is Products.FASTEST:
        return torch.bmm(x_HBD, w_HDN)
    return torch.cat([torch.bmm(x_HBD[:, b : b + 1], w_HDN) for b in range(x_HBD.shape[1])], dim=1)


@cache
def tiles_keep_bits(num_threads: int) -> bool:
    """Whether a row of a tile has the same bits whatever its place and neighbours, in float32 products here.

    ``num_threads`` are torch's, which share out a product by their number.
    """
    assert num_threads == torch.get_num_threads()
    return all(_places_keep_bits(*_trial(TILE_ROWS, num_in, num_out)) for num_in, num_out in TILE_TRIALS)


def _places_keep_bits(x_TK: Tensor, w_NK: Tensor) -> bool:
    half = TILE_ROWS // 2
    turned_TK = x_TK.flip(0)
    turned_TK[:half] = 0
    return torch.equal(torch.mm(x_TK, w_NK.T).flip(0)[half:], torch.mm(turned_TK, w_NK.T)[half:])


@cache
def _tiles_share_products(num_threads: int) -> bool:
    """Whether a row keeps its bits in a product of several tiles by ``num_threads``, which may split sums."""
    assert num_threads == torch.get_num_threads()
    return all(_slices_keep_bits(*_trial(40 * TILE_ROWS, num_in, num_out)) for num_in, num_out in SHARED_TRIALS)


def _slices_keep_bits(x_TK: Tensor, w_NK: Tensor) -> bool:
    together_TN = torch.mm(x_TK, w_NK.T)
    return all(
        torch.equal(torch.mm(x_TK[start : start + rows], w_NK.T), together_TN[start : start + rows])
        for rows in (TILE_ROWS, 3 * TILE_ROWS)
        for start in (0, 5, 7 * TILE_ROWS)
    )


def _trial(num_rows: int, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (num_rows, num_in), (num_out, num_in)
    x_TK, w_NK = (torch.randn(s, generator=generator, dtype=torch.float32, device="cpu") for s in shapes)
    return x_TK, w_NK


def _tile_product(x_TK: Tensor, w_KN: Tensor, *, out: Tensor) -> Tensor:
    """The float32 product of whole tiles, as one product if that keeps their bits."""
    if _tiles_share_products(torch.get_num_threads()):
        return torch.mm(x_TK, w_KN, out=out)
    for start in range(0, len(x_TK), TILE_ROWS):
        torch.mm(x_TK[start : start + TILE_ROWS], w_KN, out=out[start : start + TILE_ROWS])
    return out


def _filled(x_TK: Tensor) -> Tensor:
    """The rows, filled up to whole tiles with zeros."""
    rest = -len(x_TK) % TILE_ROWS
    return x_TK if rest == 0 else F.pad(x_TK, (0, 0, 0, rest))


def _rounded(wide_TN: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (wide_TN if bias_N is None else wide_TN.add_(bias_N)).to(dtype)


def _widened(x_TK: Tensor, w_NK: Tensor, product: Callable[..., Tensor] = torch.mm) -> Tensor:
    """The float32 ``product``, with the weights widened a block of rows at a time."""
    num_out, num_in = w_NK.shape
    rows = max(1, WIDEN_ELEMENTS // num_in)
    x_wide_TK = x_TK.float()
    scratch_BK, out_TN = x_wide_TK.new_empty(min(rows, num_out), num_in), x_wide_TK.new_empty(len(x_TK), num_out)
    for start in range(0, num_out, rows):
        block_BK = w_NK[start : start + rows]
        wide_BK = scratch_BK[: len(block_BK)].copy_(block_BK)
        product(x_wide_TK, wide_BK.T, out=out_TN[:, start : start + rows])
    return out_TN
