"""pack.json: written and read back alike; anything else is refused with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from duoserve.errors import CheckpointError
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pack_format import HEADER_FILE, PackHeader, read_pack_header

LAYOUT = ExpertLayout(torch.float16, hidden=64, intermediate=32)
HEADER = PackHeader.for_layout(LAYOUT, num_layers=2, num_experts=5, fingerprint="abc")


def write_header(folder: Path, **changes: Any) -> None:
    (folder / HEADER_FILE).write_text(json.dumps(HEADER.to_dict() | changes))


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_header(tmp_path)
    assert read_pack_header(tmp_path) == HEADER
    assert (HEADER.dtype, HEADER.slot_bytes) == ("float16", LAYOUT.slot_bytes)


def test_rows_lie_layer_by_layer() -> None:
    assert HEADER.total_bytes == 10 * LAYOUT.slot_bytes
    assert [HEADER.offset(ExpertId(*e)) // LAYOUT.slot_bytes for e in [(0, 0), (0, 4), (1, 0), (1, 4)]] == [0, 4, 5, 9]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"format_version": 2}, "format_version is 2, this duoserve reads 1"),
    "no version": ({"format_version": None}, "format_version is None"),
    "a field too many": ({"quantization": "int4"}, r"exactly .* wrong are \['quantization'\]"),
    "zero layers": ({"num_layers": 0}, "num_layers is 0, but must be a positive integer"),
    "a bool": ({"num_experts": True}, "num_experts is True, but must be a positive integer"),
    "a float": ({"hidden": 64.0}, "hidden is 64.0, but must be a positive integer"),
    "no fingerprint": ({"fingerprint": None}, "fingerprint is None, but must be text"),
    "unknown dtype": ({"dtype": "int3"}, "dtype is 'int3', supported are bfloat16, float16, float32"),
    "dtype no text": ({"dtype": ["float16"]}, r"dtype is \['float16'\], supported are"),
    "wrong row size": ({"slot_bytes": 4096}, "slot_bytes is 4096, but .* takes 12288"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_header_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    write_header(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"pack\.json: .*{message}.*; delete the folder and pack"):
        read_pack_header(tmp_path)


def test_a_lacking_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / HEADER_FILE).write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match=r"exactly .*wrong are .*'dtype'"):
        read_pack_header(tmp_path)


def test_what_is_no_json_is_packed_again(tmp_path: Path) -> None:
    (tmp_path / HEADER_FILE).write_text('{"format_version')
    with pytest.raises(CheckpointError, match=r"not valid JSON .*; delete the folder and pack"):
        read_pack_header(tmp_path)


def test_a_missing_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pack\.json: is missing"):
        read_pack_header(tmp_path)
