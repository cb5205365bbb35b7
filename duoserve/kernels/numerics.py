"""Conversions and matrix products for the Triton kernels that are right in the interpreter too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``): pass it to them as ``INTERPRET``."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def to_dtype(x_f32, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Rounds float32 to ``dtype``, to nearest even.

    A GPU does so by itself; the interpreter truncates to bfloat16, so there the rounding is done on the bits.
    """
    if INTERPRET and dtype == tl.bfloat16:
        bits = x_f32.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding would carry a NaN's mantissa over into an infinity or a zero.
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x_f32.to(dtype)


@triton.jit
def full_float32(x_f32):
    """``x_f32``, made such that the compiler does not see what it was converted from.

    Where it sees a narrower type, it multiplies in tf32 on sm_100, even with ``input_precision="ieee"`` (Triton issue
    10176). Not for the interpreter, which has no inline assembly.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x_f32], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def matrix_product(w_tile, x_tile, acc, INTERPRET: tl.constexpr):
    """``acc + w_tile x_tile``, float32 in full precision."""
    if INTERPRET:  # the interpreter multiplies only float32 correctly
        return tl.dot(w_tile.to(tl.float32), x_tile.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(w_tile, x_tile, acc, input_precision="ieee")


@triton.jit
def step_product(w_tile, x_tile, acc, DECODED: tl.constexpr, ARCH: tl.constexpr, INTERPRET: tl.constexpr):
    """As ``matrix_product``, in a loop; ``DECODED`` says that ``w_tile`` was decoded in registers.

    wgmma (sm_90) still reads these registers while the loop goes on: Triton 3.6 and 3.7 decode the next step's weights
    into them meanwhile, and the copies that 3.8 makes are left out by its ptxas (issue 9433). All of them wait for sums
    that anything but a product uses, so the sums go through an empty piece of assembly.
    """
    acc = matrix_product(w_tile, x_tile, acc, INTERPRET)
    if DECODED and ARCH // 10 == 9 and not INTERPRET:
        acc = tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc
