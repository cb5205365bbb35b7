"""What the experts' kernels do with a tile of sums: the activation, and where the results go.

E experts, I expert intermediate, N = 2I. In a kernel a tile is BN weight rows by BT routed rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.numerics import to_dtype
from duoserve.kernels.weights import ClampedUp


def clamp_operands(clamped: ClampedUp | None, unused: Tensor) -> tuple[Tensor, float, float]:
    """bias, alpha and limit; without ``clamped`` a kernel does not read the bias, and any pointer will do."""
    return (unused, 0.0, 0.0) if clamped is None else (clamped.bias_EN, clamped.alpha, clamped.limit)


@triton.jit
def _silu_up(acc, BN: tl.constexpr, BT: tl.constexpr):
    """``silu(gate) * up`` [BN / 2, BT] of interleaved gate and up rows."""
    pairs = tl.permute(tl.reshape(acc, (BN // 2, 2, BT)), (0, 2, 1))
    gate, up = tl.split(pairs)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _clamped_up(acc, bias, expert, first_n, N, alpha, limit, BN: tl.constexpr, BT: tl.constexpr):
    """``(up + 1) * gate * sigmoid(alpha * gate)`` [BN / 2, BT] of interleaved rows and their bias, cut at ``limit``."""
    n = tl.minimum(first_n + tl.arange(0, BN), N - 1)
    acc += tl.load(bias + expert.to(tl.int64) * N + n).to(tl.float32)[:, None]
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 2, 2, BT)), (0, 2, 1)))
    gate = tl.where(gate > limit, limit, gate)  # unlike a minimum, this keeps NaN
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))


@triton.jit
def store_rows(
    out,
    acc,
    first_n,
    rows,
    order,
    used,
    N,
    bias,
    expert,
    alpha,
    limit,
    UP: tl.constexpr,
    CLAMPED: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Writes the sums [BN, BT] of weight rows from ``first_n`` on.

    With UP it writes SwiGLU of them, or if CLAMPED the formula of ClampedUp with ``expert``'s bias, to the sorted
    ``rows``. Without UP it writes them as they are, to the places ``order`` of the rows before sorting.
    """
    if UP:
        result = _clamped_up(acc, bias, expert, first_n, N, alpha, limit, BN, BT) if CLAMPED else _silu_up(acc, BN, BT)
        columns = first_n // 2 + tl.arange(0, BN // 2)
        width = N // 2
        out_rows = rows
    else:
        result = acc
        columns = first_n + tl.arange(0, BN)
        width = N
        out_rows = order
    at = out + out_rows.to(tl.int64)[None, :] * width + columns[:, None]
    mask = used[None, :] & (columns < width)[:, None]
    tl.store(at, to_dtype(result, out.dtype.element_ty, INTERPRET), mask=mask)
