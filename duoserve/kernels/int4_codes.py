"""int4 codes on a CPU, unpacked for products and less their zero-points, which bfloat16 and float32 hold exactly.

N rows of a matrix, W int32 words of one, G groups of it; P features of a byte or a word, C bytes or words of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from duoserve.kernels.matmul import has_native_matmul

CODE_BITS, CODES_IN_WORD = 4, 8

# From words [N, W] and uint8 zero-points [N, G] to codes [G, N, P, C]: of a group the first features of all bytes or
# words, then the second ones, and so on.
Int4Codes = Callable[[Tensor, Tensor], Tensor]


def code_dtype() -> torch.dtype:
    """The dtype in which codes are multiplied here."""
    return torch.bfloat16 if has_native_matmul(torch.bfloat16) else torch.float32


def codes_by_byte(words_NW: Tensor, zeros_NG: Tensor) -> Tensor:
    """The codes, by ops on bytes; P is 2."""
    num_rows, num_groups = zeros_NG.shape
    bytes_NGC = words_NW.view(torch.uint8).view(num_rows, num_groups, -1)
    zeros_NG1 = zeros_NG.contiguous().view(torch.int8)[:, :, None]
    shape = num_groups, num_rows, 2, bytes_NGC.shape[2]
    codes_GN2C = torch.empty(shape, dtype=code_dtype(), device=words_NW.device)
    for parity, half_NGC in enumerate((bytes_NGC & 15, bytes_NGC >> CODE_BITS)):
        codes_GN2C[:, :, parity] = half_NGC.view(torch.int8).sub_(zeros_NG1).transpose(0, 1)
    return codes_GN2C


def codes_by_word(words_NW: Tensor, zeros_NG: Tensor) -> Tensor:
    """The same for a compiler, which makes one loop of it that has whole words in its vectors; P is 8."""
    words_NGC, zeros_NG1 = words_NW.unflatten(1, (zeros_NG.shape[1], -1)), zeros_NG.float()[:, :, None]
    places = range(0, CODES_IN_WORD * CODE_BITS, CODE_BITS)
    codes = [(((words_NGC >> place) & 15).float() - zeros_NG1).to(code_dtype()) for place in places]
    return torch.stack(codes, dim=2).transpose(0, 1).contiguous()
