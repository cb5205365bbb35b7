"""What tests of compiled steps share."""

from __future__ import annotations

from pathlib import Path

import pytest

from duoserve.kernels.compiled import streamed
from duoserve.kernels.compiled.compiler import can_compile
from tests.helpers.checkpoints import save_mixtral
from tests.models.cases import FAMILIES

needs_compiler = pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler")


def save(family: str, folder: Path) -> Path:
    """A small checkpoint of "mixtral", or the hard one of another family."""
    return save_mixtral(folder) if family == "mixtral" else FAMILIES[family].save(folder, FAMILIES[family].hard)


def few_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a matrix are read two at a time, which takes less compiling than eight; tests of kernels have eight."""
    monkeypatch.setattr(streamed, "STREAMS", (2, 1))
