"""Rows that stay as they are, from a file: the same bytes whichever way they come, and to no place but their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.formats.codes import LONG_ROW_BYTES, RowsAsTheyAre
from duoserve.experts.formats.fp8 import Fp8
from duoserve.experts.formats.mxfp4 import Mxfp4
from duoserve.experts.formats.reading import read_codes
from duoserve.experts.formats.scratch import Scratch
from duoserve.experts.pieces import MatrixPiece
from tests.experts.formats.tensor_rows import TensorRows

ROWS = 259  # of short ones a tile; of long ones more than one
WIDTHS = (1, 130, LONG_ROW_BYTES - 1, LONG_ROW_BYTES, 2 * LONG_ROW_BYTES + 33)
SPACE = 0xEE


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    fp8 = {f"w{width}.weight": torch.randint(256, (ROWS, width), generator=generator) for width in WIDTHS}
    mxfp4 = {"all_blocks": torch.randint(256, (3, 64, 5, 16), generator=generator)}
    return {name: tensor.to(torch.uint8) for name, tensor in (fp8 | mxfp4).items()}


@pytest.fixture(scope="module")
def checkpoint(stored: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("saved")
    fp8 = {name: tensor.view(torch.float8_e4m3fn) for name, tensor in stored.items() if name != "all_blocks"}
    scales = {f"{name}_scale_inv": torch.ones(3, -(-tensor.shape[1] // 128)) for name, tensor in fp8.items()}
    mxfp4 = {"all_blocks": stored["all_blocks"], "all_scales": torch.zeros(3, 64, 5, dtype=torch.uint8)}
    (folder / "config.json").write_text("{}")
    save_file(fp8 | scales | mxfp4, folder / "model.safetensors")
    opened = Checkpoint.open(folder)
    yield opened
    opened.close()


def written(data: RowsAsTheyAre, lane: slice, rows_N: Tensor | None = None) -> Tensor:
    """The rows of ``lane`` when ``data`` was written to them; no other byte may have changed."""
    out = torch.full((2 * data.shape[0], data.shape[1]), SPACE, dtype=torch.uint8)
    data.write(out[lane], Scratch(), rows_N)
    found = out[lane].clone()
    out[lane] = SPACE
    assert bool((out == SPACE).all())
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lane", [slice(0, None, 2), slice(1, None, 2), slice(ROWS, None)], ids=str)
def test_fp8_rows_are_those_of_the_file(
    checkpoint: Checkpoint, stored: dict[str, Tensor], width: int, lane: slice
) -> None:
    name = f"w{width}.weight"
    data = read_codes(checkpoint, Fp8(), MatrixPiece("gate", name, (ROWS, width)), Scratch()).data
    assert isinstance(data, RowsAsTheyAre)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    for found in (data, RowsAsTheyAre(TensorRows(stored[name]))):
        assert torch.equal(written(found, lane), stored[name])
        assert torch.equal(written(found, lane, order), stored[name][order])


def test_blocks_of_one_expert_are_read_as_one_range(checkpoint: Checkpoint, stored: dict[str, Tensor]) -> None:
    piece = MatrixPiece("gate_up", "all", (3, 64, 160), entry=1)
    data = read_codes(checkpoint, Mxfp4(), piece, Scratch()).data
    assert isinstance(data, RowsAsTheyAre)
    assert torch.equal(written(data, slice(64, None)), stored["all_blocks"][1].flatten(1))
