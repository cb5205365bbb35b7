"""Products of one row, written so that a compiler makes loops of them that read a matrix once and keep memory busy.

N rows of a matrix, K its inner dimension, R of them side by side; W words of a row, G groups of K, L words of one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from duoserve.kernels.bf12 import LEAST, Bf12Rows, signed
from duoserve.kernels.int4_codes import CODE_BITS, CODES_IN_WORD

# Where Linux says how many ways the L1 data cache of a core has.
L1_WAYS = Path("/sys/devices/system/cpu/cpu0/cache/index0/ways_of_associativity")
USUAL_WAYS = 8


def streams(ways_file: Path = L1_WAYS) -> tuple[int, ...]:
    """How many rows may be read side by side, so that a core has more reads under way; most first.

    They are fewer than the ways of the L1 cache: rows that lie a multiple of 4096 bytes apart share a set of it, with
    the vector that they are multiplied by.
    """
    try:
        ways = int(ways_file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        ways = USUAL_WAYS
    return tuple(count for count in (8, 4, 2, 1) if count < max(ways, 2))


STREAMS = streams()
PLACE_FACTORS = torch.tensor(
    [2.0 ** (-CODE_BITS * place) for place in range(CODES_IN_WORD - 1)] + [1.0], dtype=torch.float32, device="cpu"
)


def streamed_product(w_NK: Tensor, x_K: Tensor) -> Tensor:
    """``w x`` in float32 [N]; each row is summed in the same order whatever else is computed."""
    wide_K = x_K.float()
    return torch.cat([(part_RK.float() * wide_K).sum(-1) for part_RK in _side_by_side(w_NK)])


def streamed_fp8_product(w_NK: Tensor, scales_NG: Tensor, x_K: Tensor) -> Tensor:
    """``w x`` in float32 [N] of fp8 codes, with a scale for each row of a block of columns."""
    x_GL = x_K.float().view(scales_NG.shape[1], -1)
    parts = zip(_side_by_side(w_NK), _side_by_side(scales_NG), strict=True)
    products = [((w_RK.view(-1, *x_GL.shape).float() * x_GL).sum(-1) * scales_RG).sum(-1) for w_RK, scales_RG in parts]
    return torch.cat(products)


def streamed_int4_product(words_NW: Tensor, scales_GN: Tensor, zeros_GN: Tensor, x_K: Tensor) -> Tensor:
    """``w x`` in float32 [N] of int4 codes, eight in an int32 word, the first in its lowest bits.

    Codes are multiplied as they are, and scales are applied to the sums of groups; L lanes of them are added up last.
    """
    num_groups = len(scales_GN)
    x_8GL, sums_G = _by_place(x_K, num_groups), x_K.float().view(num_groups, -1).sum(-1)
    scales_NG = laid_down(scales_GN.float().T.contiguous())  # turned once, and not a number at a time
    parts = zip(_side_by_side(words_NW), _side_by_side(scales_NG), strict=True)
    products = [
        _scaled_sums(words_RW.unflatten(1, (num_groups, -1)), scales_RG, x_8GL) for words_RW, scales_RG in parts
    ]
    return torch.cat(products) - (zeros_GN.float() * scales_GN.float() * sums_G[:, None]).sum(0)


def streamed_bf12_product(rows: Bf12Rows, x_K: Tensor) -> Tensor:
    """``w x`` in float32 [N] of BF12: scaled sums of the codes as integers, which float32 holds exactly, and escapes.

    No bits are reinterpreted: a compiler would do that for one element after another.
    """
    wide_K = x_K.float()
    halves = laid_down(wide_K).chunk(2)
    parts = zip(_side_by_side(rows.signed_ND), _side_by_side(rows.exponents_NB), strict=True)
    sums_N = torch.cat([_integer_sums(signed_RK, exponents_RB, halves) for signed_RK, exponents_RB in parts])
    missing_NC = (rows.escapes_NC.float() - LEAST * rows.scales_N[:, None]) * rows.used_NC()
    columns_NC = rows.columns_NC.clamp(0, len(x_K) - 1).long()
    return sums_N * rows.scales_N + (missing_NC * wide_K[columns_NC]).sum(-1)


def _integer_sums(signed_RK: Tensor, exponents_RB: Tensor, halves: tuple[Tensor, ...]) -> Tensor:
    """The sums [R] of integer codes, over both halves of the columns at a time, as their exponents share bytes."""
    low_RB, high_RB = (signed(half_RB.int()) for half_RB in signed_RK.chunk(2, dim=1))
    pairs_RB = exponents_RB.int()
    low_RB, high_RB = low_RB << (pairs_RB & 15), high_RB << (pairs_RB >> 4)
    return (low_RB.float() * halves[0] + high_RB.float() * halves[1]).sum(-1)


def _scaled_sums(words_RGL: Tensor, scales_RG: Tensor, x_8GL: Tensor) -> Tensor:
    """The scaled sums [R], by half of the words' codes at a time: a longer expression would be laid down in memory."""
    halves = (range(CODES_IN_WORD // 2), range(CODES_IN_WORD // 2, CODES_IN_WORD))
    sums = [sum(_codes(words_RGL, place) * x_8GL[place] for place in places) for places in halves]
    low_RL, high_RL = ((sums_RGL * scales_RG[:, :, None]).sum(1) for sums_RGL in sums)
    return (low_RL + high_RL).sum(-1)


def _codes(words_RGL: Tensor, place: int) -> Tensor:
    """The codes at one place of the words, masked and not shifted, which ``_by_place`` makes up for.

    Those at the last place are shifted down, as they contain the sign bit.
    """
    if place == CODES_IN_WORD - 1:
        return ((words_RGL >> (CODE_BITS * place)) & 15).float()
    return (words_RGL & (15 << (CODE_BITS * place))).float()


def _by_place(x_K: Tensor, num_groups: int) -> Tensor:
    """The factors [8, G, L] of each of a word's codes, in float32, divided by the power of two of the code's place."""
    # Torch 2.11 writes C++ that no compiler takes if it may gather and transpose the row in one loop.
    wide_K = laid_down(x_K.float())
    x_8W = (wide_K.view(-1, CODES_IN_WORD) * PLACE_FACTORS).T.contiguous()
    return laid_down(x_8W).view(CODES_IN_WORD, num_groups, -1)


def laid_down(x: Tensor) -> Tensor:
    """``x``, which a compiler must lay down in memory as it is strided, instead of making it again for each row."""
    return x.as_strided(x.shape, x.stride())


def _side_by_side(matrix_NK: Tensor) -> tuple[Tensor, ...]:
    """The rows in as many equal parts as are read side by side."""
    streams = next(count for count in STREAMS if len(matrix_NK) % count == 0)
    parts: tuple[Tensor, ...] = matrix_NK.unflatten(0, (streams, -1)).unbind()
    return parts
