"""What a checkpoint is refused for: by an error that names the file, and before anything large is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from duoserve import CheckpointError, MoEModel
from duoserve.models.described import described
from tests.checkpoints import save_mixtral
from tests.small_tokenizers import byte_level_tokenizer

LOOKED_FOR = (
    *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = save_mixtral(tmp_path / "model", vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nobody may look whether there is a file of this name."""
    stat = Path.stat

    def refusing(self: Path, **options: Any) -> os.stat_result:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refusing)


@pytest.mark.parametrize("name", LOOKED_FOR)
def test_a_file_that_nobody_may_look_for_is_not_taken_for_absent(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, name)
    with pytest.raises(CheckpointError, match=rf"{folder / name}: .*Permission denied"):
        MoEModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_description_does_not_take_it_for_absent_either(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere")
    forbid(monkeypatch, name)
    with pytest.raises(CheckpointError, match=rf"{folder / name}: .*Permission denied"):
        described(folder)
    with pytest.raises(CheckpointError, match=rf"{folder / name}: .*Permission denied"):
        MoEModel.from_pretrained(folder)
