"""The experts' product with BF12 weights: tiles of both halves of a row in one step, then the escapes.

In a kernel N is the weight's rows and D its inner dimension; a tile is BN weight rows by BT routed rows. ``bf12.py``
has the bytes of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from duoserve.kernels.dequant import bf12_unit, decode_bf12
from duoserve.kernels.numerics import full_float32, matrix_product, step_product


@triton.jit
def places_of(D):
    """C: ``bf12.room``."""
    return tl.minimum(tl.maximum(tl.cdiv(D, 1024) * 4, 4), 16)


@triton.jit
def bytes_of_row(D):
    """B: ``bf12.row_bytes``."""
    return tl.cdiv(D // 2 * 3 + places_of(D) * 4, 16) * 16


@triton.jit
def _escapes(x, x_rows, escapes_at, least, most, D):
    """What the escapes of the first ``most`` places add to the sums [BN, rows] over the ``least`` in their columns."""
    x_at = x + x_rows.to(tl.int64) * D
    columns_at = escapes_at.to(tl.pointer_type(tl.int16)) - places_of(D)
    more = tl.zeros((escapes_at.shape[0], x_rows.shape[0]), tl.float32)
    for place in range(0, most):
        weight = tl.load(escapes_at + place).to(tl.float32)
        column = tl.load(columns_at + place)
        # A place that is not used must not read x, which may be NaN there. And the bytes may be no expert's, so columns
        # are checked before they are followed.
        used = (weight != least) & (column >= 0) & (column < D)
        x_tile = tl.load(x_at[None, :] + column[:, None], mask=used[:, None], other=0.0).to(tl.float32)
        more += (weight - least)[:, None] * x_tile
    return more


@triton.jit
def _add_escapes(acc, x, x_rows, escapes_at, least, D, BN: tl.constexpr, BT: tl.constexpr, PLACES: tl.constexpr = 16):
    """``acc`` [BN, BT] with each escape's weight instead of the ``least`` that stands in its column.

    The weights of a row's places begin at ``escapes_at`` [BN]. Places are used from the first on, so those that no row
    of the tile uses are at the end and cost nothing. Sums are added even if there are no escapes, or the sign of a zero
    would depend on the other rows of the tile. The rows of x are taken in pieces, as registers do not hold all of them.
    """
    PIECE: tl.constexpr = min(BT, 16)
    PIECES: tl.constexpr = BT // PIECE
    place = tl.arange(0, PLACES)
    there = place[None, :] < places_of(D)
    weights = tl.load(escapes_at[:, None] + place[None, :], mask=there, other=0.0).to(tl.float32)
    used = there & (weights != least[:, None])
    most = tl.max(tl.max(tl.where(used, place[None, :] + 1, 0), axis=1), axis=0)
    if PIECES == 1:
        return acc + _escapes(x, x_rows, escapes_at, least, most, D)
    else:
        acc = tl.reshape(acc, (BN, PIECES, PIECE))
        pieces = tl.arange(0, PIECES)
        rows = tl.reshape(x_rows, (PIECES, PIECE))
        for piece in range(0, PIECES):
            these = tl.sum(tl.where(pieces[:, None] == piece, rows, 0), axis=0)
            more = _escapes(x, these, escapes_at, least, most, D)
            acc = tl.where(pieces[None, :, None] == piece, acc + more[:, None, :], acc)
        return tl.reshape(acc, (BN, BT))


@triton.jit
def bf12_product(
    x,
    x_rows,
    w,
    scales,
    slot,
    slot_stride,
    scales_stride,
    first_n,
    N,
    D,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ARCH: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``moe_gemm.product`` of BF12 weights, read through pointers.

    A step takes BK columns, half of them from each half of the rows, so that every byte of codes is read once.
    """
    slot = slot.to(tl.int64)
    # If EVEN, D / 2 is a multiple of BK / 2. The compiler cannot know that, and needs it for wide loads from there on.
    half = tl.multiple_of(D // 2, BK // 2) if EVEN else D // 2
    n = tl.minimum(first_n + tl.arange(0, BN), N - 1)
    row_at = w + slot * slot_stride + n * tl.multiple_of(bytes_of_row(D), 16)
    x_at = x + x_rows.to(tl.int64) * D
    k = tl.arange(0, BK // 2)
    acc = tl.zeros((BN, BT), tl.float32)
    for first_k in range(0, half, BK // 2):
        w_at = row_at[:, None] + (first_k + k)[None, :]
        xs_at = x_at[None, :] + (first_k + k)[:, None]
        left = half - first_k
        low = tl.load(w_at) if EVEN else tl.load(w_at, mask=k[None, :] < left, other=0)
        high = tl.load(w_at + half) if EVEN else tl.load(w_at + half, mask=k[None, :] < left, other=0)
        codes = tl.load(w_at + D) if EVEN else tl.load(w_at + D, mask=k[None, :] < left, other=0)
        low_x = tl.load(xs_at) if EVEN else tl.load(xs_at, mask=k[:, None] < left, other=0.0)
        high_x = tl.load(xs_at + half) if EVEN else tl.load(xs_at + half, mask=k[:, None] < left, other=0.0)
        low = decode_bf12(low, codes, False, x.dtype.element_ty, INTERPRET)
        high = decode_bf12(high, codes, True, x.dtype.element_ty, INTERPRET)
        if (x.dtype.element_ty == tl.float32) & (not INTERPRET):
            low = full_float32(low)
            high = full_float32(high)
        acc = matrix_product(low, low_x, acc, INTERPRET)
        acc = step_product(high, high_x, acc, True, ARCH, INTERPRET)
    scale = tl.load(scales + slot * scales_stride + n)
    acc *= (scale * bf12_unit(x.dtype.element_ty))[:, None]
    escapes_at = (row_at + D // 2 * 3).to(tl.pointer_type(tl.bfloat16)) + places_of(D)
    return _add_escapes(acc, x, x_rows, escapes_at, scale * 128.0, D, BN, BT)
