"""Quantized matrices, made from what their formats' authors write of them: codes, scales, and the weights they mean.

N output features, D input features. Nothing here is taken from what reads them: words are put together one code after
another, and weights are worked out in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

E2M1 = np.array([sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours lies in each nibble of a word, the lowest first


class Encoded(NamedTuple):
    """``tensors`` by what is added to a module's name; ``weight_ND`` float32 is what they mean."""

    tensors: dict[str, Tensor]
    weight_ND: Tensor


Encode = Callable[[Tensor], Encoded]


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent (bias 7), three of mantissa."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def fp8(weight_ND: Tensor, scale_dtype: torch.dtype = torch.float32) -> Encoded:
    """One scale for 128 x 128 weights, or what is left of them at the edges; the largest of them becomes 448."""
    n, d = weight_ND.shape
    codes = torch.empty(n, d, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-n // 128), -(-d // 128), dtype=scale_dtype)
    weight = np.empty((n, d), dtype=np.float32)
    values = np.array([e4m3(byte) for byte in range(256)])
    for row in range(0, n, 128):
        for column in range(0, d, 128):
            block = np.s_[row : row + 128, column : column + 128]
            scale = (weight_ND[block].abs().max() / 448).to(scale_dtype)
            scales[row // 128, column // 128] = scale
            codes[block] = (weight_ND[block] / scale.float()).to(torch.float8_e4m3fn)
            weight[block] = values[codes[block].view(torch.uint8).numpy()] * float(scale)
    return Encoded({"weight": codes, "weight_scale_inv": scales}, torch.from_numpy(weight))


def mxfp4(weight_ND: Tensor) -> Encoded:
    """For 32 inputs one power of two, and a table of eight sizes; two codes in a byte, the first in the low half."""
    n, d = weight_ND.shape
    w = weight_ND.double().numpy().reshape(n, d // 32, 32)
    exponents = np.floor(np.log2(np.abs(w).max(-1, keepdims=True))).astype(int) - 2
    codes = np.abs(w[..., None] / 2.0 ** exponents[..., None] - E2M1).argmin(-1)
    values = (E2M1[codes] * 2.0**exponents).reshape(n, d)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)
    scales = (exponents[..., 0] + 127).astype(np.uint8)
    tensors = {"blocks": torch.from_numpy(blocks), "scales": torch.from_numpy(scales)}
    return Encoded(tensors, torch.from_numpy(values).float())


def awq(weight_ND: Tensor, group: int, scale_dtype: torch.dtype = torch.float16, symmetric: bool = False) -> Encoded:
    """GEMM: inputs by outputs, eight outputs in a word."""
    groups_D = np.arange(weight_ND.shape[1]) // group
    codes_ND, zeros_GN, scales_GN, meant_ND = _int4(weight_ND, groups_D, symmetric, scale_dtype)
    tensors = {
        "qweight": _signed(_words(codes_ND.T, AWQ_ORDER)),
        "qzeros": _signed(_words(zeros_GN, AWQ_ORDER)),
        "scales": scales_GN,
    }
    return Encoded(tensors, meant_ND)


def gptq(
    weight_ND: Tensor,
    group: int,
    version: int = 1,
    symmetric: bool = False,
    order_D: np.ndarray | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> Encoded:
    """Inputs by outputs, eight inputs in a word. Groups are filled in the order of ``order_D``.

    Of version 1 the zero-points are stored one less than they are, words of eight at a time.
    """
    inputs = weight_ND.shape[1]
    groups_D = np.empty(inputs, dtype=np.int64)
    groups_D[np.arange(inputs) if order_D is None else order_D] = np.arange(inputs) // group
    codes_ND, zeros_GN, scales_GN, meant_ND = _int4(weight_ND, groups_D, symmetric, scale_dtype)
    in_turn = tuple(range(8))
    zeros = _words(zeros_GN, in_turn)
    tensors = {
        "qweight": _signed(_words(codes_ND, in_turn)).T.contiguous(),
        "qzeros": _signed(zeros if version == 2 else (zeros - 0x11111111) % 2**32),
        "scales": scales_GN,
        "g_idx": torch.from_numpy(groups_D.astype(np.int32)),
    }
    return Encoded(tensors, meant_ND)


def _int4(
    weight_ND: Tensor, groups_D: np.ndarray, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Codes, zero-points, scales, and the weights ``(code - zero) * scale``."""
    w_ND = weight_ND.double().numpy()
    n, count = len(w_ND), groups_D.max() + 1
    codes_ND, meant_ND = np.empty(w_ND.shape, dtype=np.int64), np.empty(w_ND.shape)
    zeros_GN, scales_GN = np.empty((count, n), dtype=np.int64), torch.empty(count, n, dtype=scale_dtype)
    for group in range(count):
        columns = np.flatnonzero(groups_D == group)
        part = w_ND[:, columns]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        step = np.abs(part).max(1) / 7 if symmetric else (high - low) / 15
        scales_GN[group] = torch.from_numpy(step)
        scale = scales_GN[group].double().numpy()[:, None]
        zero = np.full((n, 1), 8) if symmetric else np.clip(np.rint(-low[:, None] / scale), 0, 15).astype(np.int64)
        codes = np.clip(np.rint(part / scale) + zero, 0, 15).astype(np.int64)
        codes_ND[:, columns], zeros_GN[group], meant_ND[:, columns] = codes, zero[:, 0], (codes - zero) * scale
    return codes_ND, zeros_GN, scales_GN, torch.from_numpy(meant_ND).float()


def _words(codes: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Eight neighbours of the last dimension in a word of 32 bits."""
    eights = codes.reshape(len(codes), -1, 8)
    return sum(eights[..., place].astype(np.int64) << 4 * nibble for nibble, place in enumerate(order))


def _signed(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())
