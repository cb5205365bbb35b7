"""BF12: the bits of bfloat16 weights in 12 bits each, and a few that do not fit, the escapes, in full.

N rows of a matrix, D its inner dimension, B bytes of a row, C places for escapes. A row is ``[D | D / 2 | 2 C | 2 C]``
bytes, padded to 16:

- int8 ``q[d]``, which is sign and mantissa: ``128 + q`` where q >= 0, else ``q - 127``, so 128 to 255 and a sign;
- 4 bits ``e[d]``, the exponent over the row's least: of column d in the low half of byte d, of column D / 2 + d in the
  high half. The weight is ``(sign and mantissa << e[d]) * s[n]``, with a power of two ``s[n]`` for each row, or 0;
- int16 columns of the escapes, and their bfloat16 weights. A place that is not used has column 0 and ``128 s[n]``, and
  so has the column of an escape in the first two parts; no escape has that weight.

All but one in ten thousand weights of a trained layer lie within 16 exponents of each other. Source: Zhang et al.
(2025), DFloat11, save the same redundancy by codes of variable length; codes of equal length can be read at any place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS, EXPONENTS = 12, 16
ALIGNMENT = 16
LEAST = 128  # the weight, over the row's scale, that stands in an escape's column
_BYTE, _PLACE = 8, 4  # bits of a byte; bytes of an escape's column and weight
_MANTISSA, _BIAS_OF_SCALE, _MAGNITUDE = 7, 7, 0x7FFF


def room(inner: int) -> int:
    """C: 4 in a row of 768 weights, 16 in rows of 4096 or more.

    With normally distributed weights, none of 260,000 rows of 768 used more than 3 places, and none of 48,000 rows of
    4096 more than 5.
    """
    return min(16, max(4, -(-inner // 1024) * 4))


def used_bytes(inner: int) -> int:
    """Bytes of a row before padding, for D in multiples of 4."""
    return inner * BITS // _BYTE + room(inner) * _PLACE


def row_bytes(inner: int) -> int:
    """B, for D in multiples of 4."""
    return -(-used_bytes(inner) // ALIGNMENT) * ALIGNMENT


class Bf12Rows(NamedTuple):
    """The parts of rows: int8 [N, D], uint8 [N, D / 2], int16 [N, C], bfloat16 [N, C] and float32 scales [N]."""

    signed_ND: Tensor
    exponents_NB: Tensor
    columns_NC: Tensor
    escapes_NC: Tensor
    scales_N: Tensor

    @classmethod
    def of(cls, data_NB: Tensor, scales_N: Tensor, inner: int) -> Bf12Rows:
        """Views of uint8 rows."""
        places, end = room(inner), inner * BITS // _BYTE
        columns, escapes = (data_NB[:, at : at + 2 * places] for at in (end, end + 2 * places))
        return cls(
            data_NB[:, :inner].view(torch.int8),
            data_NB[:, inner:end],
            columns.view(torch.int16),
            escapes.view(torch.bfloat16),
            scales_N,
        )

    def dense(self) -> Tensor:
        """The weights [N, D] in bfloat16, every bit as it was."""
        bits_ND = self.signed_ND.to(torch.int16)
        bits_ND ^= (bits_ND >> 15).bitwise_and_(_MAGNITUDE)
        least_N1 = ((self.scales_N.view(torch.int32) >> 23) + _BIAS_OF_SCALE).to(torch.int16)[:, None]
        for half_NB, codes_NB in zip(
            bits_ND.chunk(2, dim=1), (self.exponents_NB & 15, self.exponents_NB >> 4), strict=True
        ):
            half_NB.add_(codes_NB.to(torch.int16).add_(least_N1).bitwise_left_shift_(_MANTISSA))
        zero_N = self.scales_N == 0
        if bool(zero_N.any()):
            bits_ND[zero_N] &= ~_MAGNITUDE
        w_ND = bits_ND.view(torch.bfloat16)
        self.put_escapes(w_ND, self.used_NC())
        return w_ND

    def used_NC(self) -> Tensor:
        """Which places for escapes are used. A place that names no column, as in a damaged pack, does not count."""
        named_NC = (self.columns_NC >= 0) & (self.columns_NC < self.signed_ND.shape[1])
        return (self.escapes_NC != (LEAST * self.scales_N)[:, None]) & named_NC

    def put_escapes(self, w_ND: Tensor, used_NC: Tensor) -> None:
        """Writes the escapes of the places ``used_NC`` into rows that are complete but for these."""
        rows, places = used_NC.nonzero(as_tuple=True)
        w_ND[rows, self.columns_NC[rows, places].long()] = self.escapes_NC[rows, places]

    def cut(self, rows: slice) -> Bf12Rows:
        """The parts of some rows."""
        return Bf12Rows(*(part[rows] for part in self))


def signed(codes: Tensor) -> Tensor:
    """Sign and mantissa of int32 codes, as integers."""
    return (codes ^ LEAST) - (codes >> 31)
