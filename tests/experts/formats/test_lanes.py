"""Words turned into rows a tile at a time: the same bytes whatever the tiles, in rows of any order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from duoserve.experts.formats import awq, gptq
from duoserve.experts.formats.codes import TILE_BYTES
from duoserve.experts.formats.lanes import RepackedRows, narrowed, transposed, wide_tile
from duoserve.experts.formats.scratch import Scratch
from tests.experts.formats.tensor_rows import TensorRows

INPUTS, OUTPUTS = 192, 416
ORDER = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(3))
ROWS = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(4))
KINDS = ("awq", "gptq", "gptq, ordered")


def codes_DN() -> Tensor:
    return torch.randint(0, 16, (INPUTS, OUTPUTS), generator=torch.Generator().manual_seed(5))


def words_of(codes_8XY: Tensor, places: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight neighbours of the first dimension in a word, the i-th in nibble ``places[i]``."""
    parts = codes_8XY.view(-1, 8, codes_8XY.shape[1]) << (4 * torch.tensor(places))[:, None]
    return parts.sum(1).to(torch.int32)


def repacked(kind: str) -> RepackedRows:
    if kind == "awq":
        return awq._outputs(TensorRows(words_of(codes_DN().T.contiguous(), awq.NIBBLE_OF_OUTPUT).T.contiguous()))
    return gptq._outputs(TensorRows(words_of(codes_DN())), ORDER if kind == "gptq, ordered" else None)


def expected(kind: str) -> Tensor:
    codes_ND = (codes_DN()[ORDER] if kind == "gptq, ordered" else codes_DN()).T
    return (codes_ND[:, 0::2] | codes_ND[:, 1::2] << 4).to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [8, 16, 40, 1000])
@pytest.mark.parametrize("rows", [2, 6, 16, 1000])
def test_tiles_of_any_size_give_the_same_bytes(kind: str, rows: int, columns: int) -> None:
    found = repacked(kind)
    if kind != "gptq, ordered":  # whose tiles have all rows
        found = replace(found, tile=(rows, found.tile[1]))
    found = replace(found, tile=(found.tile[0], columns))
    for rows_N in (None, ROWS):
        out = torch.zeros(2 * OUTPUTS, INPUTS // 2, dtype=torch.uint8)  # of which every second row is filled
        found.write(out[1::2], Scratch(), rows_N)
        assert torch.equal(out[1::2], expected(kind) if rows_N is None else expected(kind)[rows_N])
        assert not out[0::2].any()


def test_the_bytes_of_words_are_narrowed_one_by_one() -> None:
    """Memory that is used again still has its spare bytes behind it, whatever was in it before."""
    scratch = Scratch()
    scratch.array("a", (100,))
    for size in (100, 7, 101):
        words = scratch.array("a", (size,))
        words[:] = np.random.default_rng(size).integers(0, 1 << 32, size, dtype=np.uint32)
        for byte in range(4):
            out = np.empty(size, np.uint8)
            narrowed(words, byte, out)
            assert np.array_equal(out, words.view(np.uint8)[byte::4])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
@pytest.mark.parametrize(("num_rows", "columns"), [(1, 1), (3, 5), (64, 40), (80, 416), (257, 16)])
def test_words_and_bytes_are_transposed_bit_by_bit(num_rows: int, columns: int, dtype: type[np.generic]) -> None:
    """Words are any bits: among them are those of floats that are no numbers, signalling ones too."""
    words = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (num_rows, columns), dtype, endpoint=True)
    words[0, 0] = np.uint32(0x7FA00001).astype(dtype)
    found = transposed(words)
    assert found.dtype == dtype and np.array_equal(found, words.T)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 14336), (14336, 4096), (256, 256)])
def test_tiles_make_an_odd_number_of_lines_of_every_row(kind: str, inputs: int, outputs: int) -> None:
    words_XY = torch.empty((inputs, outputs // 8) if kind == "awq" else (inputs // 8, outputs), dtype=torch.int32)
    rows, columns = wide_tile(TensorRows(words_XY), outputs)
    made, left = divmod(rows * columns * 4, outputs)
    assert columns == words_XY.shape[1] and left == 0 and made % 128 == 64
    assert outputs * made < 1.5 * TILE_BYTES or inputs == 256
