"""Quantizes floats to int8 or int4 codes. Of several scales, the one with the smallest squared error is taken.

A search is plain PyTorch on a block of places, run by compiled loops or op by op. A place is X weights that share a
scale: in int8 a row, in int4 a group. P places, N rows of a matrix, D its inner dimension, G groups of D, B bytes of
the codes of a place, S spans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.callers import warn_caller
from duoserve.errors import CopyError
from duoserve.experts.layout import Quantized
from duoserve.kernels.compiled.loops import CompiledLoops
from duoserve.kernels.compiled.streamed import laid_down
from duoserve.kernels.matmul import power_of_two
from duoserve.kernels.weights import ExpertFormat, Matrix

Loops = Callable[..., None]  # of a search and what it takes

# The candidate scales cover these shares of the weights' range: a smaller share clips the largest weights and gives the
# others finer steps.
INT4_SPANS = tuple(1 - step / 32 for step in range(12))
INT8_SPANS = tuple(1 - step / 64 for step in range(8))
INT4_MOST, INT8_MOST = 15, 127
INT4_SPANS_S1 = torch.tensor(INT4_SPANS, dtype=torch.float32, device="cpu")[:, None]
INT8_SHARES_S1 = torch.tensor(INT8_SPANS, dtype=torch.float32, device="cpu")[:, None] / INT8_MOST


def op_by_op(search: Callable[..., None], *parts: Tensor) -> None:
    """Runs a search on the calling thread, as long as blocks are small."""
    search(*parts)


class Way(NamedTuple):
    """How searches run: a block has about ``block_weights``, and there are blocks of few shapes only.

    At most ``at_a_time`` experts are made at once. Compiled loops take all cores, so that whoever worked beside them
    would stop them at every one of their barriers.
    """

    loops: Loops
    block_weights: int
    at_a_time: int = 1

    @classmethod
    def compiled(cls) -> Way:
        """Searches by compiled loops: seconds for the first block of a shape. For where there is a C++ compiler."""
        return cls(CompiledLoops(), 1 << 20)


# What is between two ops stays in a core's cache, and PyTorch shares no op out, so that others may work beside it.
OP_BY_OP = Way(op_by_op, 1 << 15, at_a_time=2)


class ScaleSearch:
    """Quantizes matrices, from any thread."""

    def __init__(self, stored: Quantized, way: Way = OP_BY_OP) -> None:
        self._stored = stored
        self._way = way

    def fill(self, matrix: Matrix, rows: slice, w_ND: Tensor) -> Tensor:
        """Quantizes ``w_ND`` (contiguous) to ``rows`` of the one slot of ``matrix``.

        Returns two sums of squares, those of the errors and of the weights: float64 [2]. Raises CopyError for weights
        that are no finite numbers.
        """
        places = _Places.of(matrix, rows, w_ND, self._stored)
        self._search(places)
        places.write_scales(matrix, rows)
        return places.squares_2(relative=self._stored.format is ExpertFormat.INT8)

    def _search(self, places: _Places) -> None:
        try:
            places.search(self._way)
        except RuntimeError as error:
            if self._way is OP_BY_OP:
                raise
            cause = str(error).partition("\n")[0]
            warn_caller(f"scales are searched for op by op, more slowly: compiling failed ({cause})")
            self._way = OP_BY_OP
            places.search(self._way)


class _Places(NamedTuple):
    """Weights, and what a search makes of them; of each place also its largest weight, and sums of squares."""

    w_PX: Tensor
    data_PB: Tensor
    scales_P: Tensor
    zeros_P: Tensor
    errors_P: Tensor
    weights_P: Tensor
    largest_P: Tensor

    @classmethod
    def of(cls, matrix: Matrix, rows: slice, w_ND: Tensor, stored: Quantized) -> _Places:
        w_PX = w_ND.view(-1, stored.group or w_ND.shape[1])
        assert matrix.scales_SGN is not None
        return cls(
            w_PX,
            matrix.data_SNB[0, rows].view(len(w_PX), -1),
            w_PX.new_empty(len(w_PX), dtype=matrix.scales_SGN.dtype),
            w_PX.new_empty(len(w_PX), dtype=torch.uint8),
            *w_PX.new_empty(3, len(w_PX), dtype=torch.float32).unbind(),
        )

    def search(self, way: Way) -> None:
        """Searches in blocks of one size. The last block overlaps the one before; too few places are padded to one."""
        places, size = self.w_PX.shape
        block = power_of_two(max(1, way.block_weights // size))
        if places < block:
            padded = _Places(*(torch.cat([part, part.new_zeros(block - places, *part.shape[1:])]) for part in self))
            padded._search_block(way.loops)
            for part, made in zip(self[1:], padded[1:], strict=True):
                part.copy_(made[:places])
            return
        for start in (*range(0, places - block, block), places - block):
            _Places(*(part[start : start + block] for part in self))._search_block(way.loops)

    def _search_block(self, loops: Loops) -> None:
        if self.data_PB.dtype == torch.int8:
            loops(_int8, *self)
        else:
            loops(_int4, *self, *_int4_scales(loops, self.w_PX, self.scales_P.dtype))

    def write_scales(self, matrix: Matrix, rows: slice) -> None:
        for parts, part_P in ((matrix.scales_SGN, self.scales_P), (matrix.zeros_SGN, self.zeros_P)):
            if parts is not None:
                parts[0, :, rows] = part_P.view(rows.stop - rows.start, -1).T

    def squares_2(self, relative: bool) -> Tensor:
        """The sums of squares for ``ScaleSearch.fill``; ``relative``: a place's are of shares of its largest weight."""
        if not self.largest_P.isfinite().all():
            raise CopyError("not all weights are finite numbers")
        squares_2P = torch.stack([self.errors_P, self.weights_P]).double()
        return (squares_2P * self.largest_P.double().square() if relative else squares_2P).sum(1)


def _int8(  # noqa: PLR0913, PLR0917
    w_PX: Tensor,
    data_PX: Tensor,
    scales_P: Tensor,
    _zeros_P: Tensor,
    errors_P: Tensor,
    weights_P: Tensor,
    largest_P: Tensor,
) -> None:
    """Squares are those of shares of the largest weight, which float32 holds whatever the weights."""
    sizes_PX = w_PX.float().abs()
    most_P = laid_down(sizes_PX.amax(1))
    largest_P.copy_(most_P)
    scales_SP = laid_down(most_P * INT8_SHARES_S1)
    steps_SP = laid_down(_steps(scales_SP))
    errors_SP = torch.stack([_int8_error(sizes_PX, steps_P) for steps_P in steps_SP]) * INT8_SHARES_S1.square()
    error_P, scale_P, chosen_P = _least(errors_SP, scales_SP, steps_SP)
    whole_P = _squares(sizes_PX * steps_SP[0][:, None]) * INT8_MOST**-2
    errors_P.copy_(error_P)
    weights_P.copy_(whole_P)
    scales_P.copy_(scale_P)
    codes_PX = (w_PX.float() * laid_down(chosen_P)[:, None]).round()
    data_PX.copy_(codes_PX.clamp(-INT8_MOST, INT8_MOST).to(torch.int8))


def _int4_scales(loops: Loops, w_PX: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The range of each place's weights, 0 included: [P] and [P]; and scales [S, P] as they will be stored.

    These are not compiled: a compiler leaves out what rounds a number on its way.
    """
    low_P, high_P = w_PX.new_empty(2, len(w_PX), dtype=torch.float32).unbind()
    loops(_int4_range, w_PX, low_P, high_P)
    spanned_SP = (high_P - low_P) * (INT4_SPANS_S1 / INT4_MOST)
    return low_P, high_P, spanned_SP.clamp_(max=torch.finfo(dtype).max).to(dtype)


def _int4_range(w_PX: Tensor, low_P: Tensor, high_P: Tensor) -> None:
    wide_PX = w_PX.float()
    low_P.copy_(wide_PX.amin(1).clamp(max=0))
    high_P.copy_(wide_PX.amax(1).clamp(min=0))


def _int4(  # noqa: PLR0913, PLR0917
    w_PX: Tensor,
    data_PB: Tensor,
    scales_P: Tensor,
    zeros_P: Tensor,
    errors_P: Tensor,
    weights_P: Tensor,
    largest_P: Tensor,
    low_P: Tensor,
    high_P: Tensor,
    rounded_SP: Tensor,
) -> None:
    """Searches a block in int4; the last three operands are as ``_int4_scales`` makes them."""
    wide_PX, scales_SP = w_PX.float(), rounded_SP.float()
    largest_P.copy_(torch.maximum(high_P, -low_P))
    steps_SP = laid_down(_steps(scales_SP))
    zeros_SP = laid_down((low_P * -INT4_SPANS_S1 * steps_SP).round().clamp(0, INT4_MOST))
    errors = [_int4_error(wide_PX, *place) for place in zip(steps_SP, zeros_SP, strict=True)]
    whole_P = _squares(wide_PX)
    # A scale that rounds to zero leaves nothing of the weights, so that all of them is its error.
    errors_SP = torch.where(scales_SP > 0, torch.stack(errors) * scales_SP * scales_SP, whole_P)
    error_P, scale_P, steps_P, zero_P = _least(errors_SP, scales_SP, steps_SP, zeros_SP)
    errors_P.copy_(error_P)
    weights_P.copy_(whole_P)
    scales_P.copy_(scale_P)
    zeros_P.copy_(zero_P)
    codes_PX = wide_PX * laid_down(steps_P)[:, None] + laid_down(zero_P)[:, None]
    data_PB.copy_(_two_in_a_byte(codes_PX.round().clamp(0, INT4_MOST).to(torch.uint8)))


def _int8_error(sizes_PX: Tensor, steps_P: Tensor) -> Tensor:
    """The squared error of each place, [P], in squares of steps."""
    codes_PX = sizes_PX * steps_P[:, None]
    return _squares(codes_PX.sub_(codes_PX.round().clamp_(max=INT8_MOST)))


def _int4_error(wide_PX: Tensor, steps_P: Tensor, zeros_P: Tensor) -> Tensor:
    """The squared error of each place, [P], in squares of steps.

    ``relu`` keeps codes from falling below 0: a clamp has to heed NaN, so a compiler makes several instructions of it.
    """
    codes_PX = (wide_PX * steps_P[:, None]).add_(zeros_P[:, None])
    return _squares(codes_PX - codes_PX.round().relu().clamp(max=INT4_MOST))


def _steps(scales: Tensor) -> Tensor:
    """The number of steps in a weight of 1; 0 where float32 cannot hold it, so that such small weights become 0."""
    return torch.where(scales >= torch.finfo(torch.float32).tiny, 1 / scales, 0)


def _squares(x_PX: Tensor) -> Tensor:
    return (x_PX * x_PX).sum(1)


def _least(errors_SP: Tensor, *others_SP: Tensor) -> list[Tensor]:
    """[P]: the least error of each place, and what belongs to its span."""
    best_1P = laid_down(errors_SP).argmin(0, keepdim=True)
    return [of_SP.gather(0, best_1P)[0] for of_SP in (errors_SP, *others_SP)]


def _two_in_a_byte(codes_PX: Tensor) -> Tensor:
    """[P, X / 2]; an even element is in the low half."""
    pairs_PB = laid_down(codes_PX.contiguous()).view(torch.int16)
    return (pairs_PB | pairs_PB >> 4) & 255
