"""How many rows of a matrix are read side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from duoserve.kernels.compiled.streamed import streams


@pytest.mark.parametrize(
    ("ways", "expected"), [("12\n", (8, 4, 2, 1)), ("8\n", (4, 2, 1)), ("4\n", (2, 1)), ("2\n", (1,)), ("1\n", (1,))]
)
def test_rows_of_one_set_and_their_vector_fit_into_its_ways(
    ways: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    (file := tmp_path / "ways").write_text(ways)
    assert streams(file) == expected


def test_without_a_word_of_the_system_a_cache_has_the_usual_ways(tmp_path: Path) -> None:
    (empty := tmp_path / "empty").write_text("")
    assert streams(tmp_path / "missing") == streams(empty) == (4, 2, 1)
