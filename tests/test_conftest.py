"""What holds for all tests: their order, the same examples in every run, and no GPU where none is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duoserve import MoEModel
from duoserve.experts.device import resolve_device
from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import os, time
import pytest
from hypothesis import given, settings, strategies as st

@settings(max_examples=3)
@given(st.integers(), st.floats(0, 1))
def test_slow(number, share):
    print("said", number, share)
    time.sleep(0.3)

@pytest.mark.{marker}
def test_of_a_gpu(monkeypatch):
    print("said", os.environ.get("CUDA_VISIBLE_DEVICES"))
"""


def said(folder: Path, marker: str) -> list[str]:
    """What such tests are given, in a process of their own."""
    (folder / "test_any.py").write_text(TESTS.format(marker=marker))
    command = [sys.executable, "-m", "pytest", "-s", "-p", "tests.conftest", "-p", "no:cacheprovider", "."]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"}
    env.pop("CI", None)  # which makes other settings Hypothesis's own
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return [line.partition("said ")[2] for line in done.stdout.splitlines() if "said " in line]


def test_the_files_that_come_first_are_there() -> None:
    assert set(LONGEST) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_run_has_the_same_examples_and_hides_the_gpu_unless_it_is_asked_for(tmp_path: Path) -> None:
    *examples, hidden = said(tmp_path, marker="any")
    *same, seen = said(tmp_path, marker="gpu")
    assert examples == same and len(set(examples)) == 3
    assert (hidden, seen) == ("", "0")


def test_a_model_of_a_test_that_names_no_device_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert resolve_device("auto") == torch.device("cpu")
    with MoEModel.from_pretrained("bard") as model:
        assert len(model.generate("To be", max_tokens=2).token_ids) == 2
