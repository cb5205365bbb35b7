"""A small checkpoint with a tokenizer, and the command line as a function."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from duoserve.cli import main
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.small_tokenizers import byte_level_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers of 8 experts, top-2; its tokenizer writes bytes, so any token has text."""
    folder = save_mixtral(tmp_path_factory.mktemp("model"), vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def textless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a tokenizer."""
    return save_mixtral(tmp_path_factory.mktemp("textless"), vocab_size=291)


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture
def duoserve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a command; packs go to a cache of the test's own."""
    monkeypatch.setenv("DUOSERVE_CACHE", str(tmp_path / "cache"))

    def run(*argv: str | Path) -> Ran:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit_:  # argparse's way to end
            code = exit_.code if isinstance(exit_.code, int) else 1
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def buffered_command(tmp_path: Path) -> dict[str, Any]:
    """Arguments of ``subprocess.Popen`` for the command as a shell runs it, its output buffered as usual."""
    environment = os.environ | {"DUOSERVE_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTHONUNBUFFERED", None)
    start = "import sys; from duoserve.cli import main; sys.exit(main())"
    return {"args": [sys.executable, "-c", start], "env": environment, "stderr": subprocess.PIPE}
