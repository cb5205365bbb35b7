"""The one command for a GPU machine: what it does without a GPU, and that it benches even when tests fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")

# Claims a GPU, and to have all packages but xdist; answers for pytest; lets Python do the rest.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *is_available*) exit 0 ;;
    *get_device_name*) echo nvidia-h100 ;;
    *find_spec*) [[ $* != *xdist* ]] ;;
    *"-m pytest"*) echo "pytest $*"; exit "$PYTEST_STATUS" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In the repository."""
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=300, check=False
    )


def test_the_suites_syntax() -> None:
    done = run("bash", "-n", "bench/gpu_suite.sh")
    assert done.returncode == 0, done.stderr


@NO_GPU
def test_the_suite_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    done = run("bash", "bench/gpu_suite.sh", PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert "no CUDA GPU: no test and no bench was run" in done.stdout and "not measured" in done.stdout
    assert not (tmp_path / "out").exists()


@NO_GPU
@pytest.mark.parametrize(("pytest_status", "status"), [(0, 0), (1, 1)])
def test_the_suite_benches_even_when_tests_fail(tmp_path: Path, pytest_status: int, status: int) -> None:
    fake, out = tmp_path / "python", tmp_path / "out"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    settings = {"REAL_PYTHON": sys.executable, "PYTEST_STATUS": str(pytest_status), "PYTHON": str(fake)}
    done = run("bash", "bench/gpu_suite.sh", OUT=str(out), **settings)
    assert done.returncode == status, done.stdout + done.stderr
    assert f"tests {'FAILED' if status else 'passed'}, bench passed" in done.stdout
    assert "tests/kernels" in (out / "gpu-tests.log").read_text()
    assert [path.suffix for path in sorted(out.glob("kernels-nvidia-h100-*"))] == [".json", ".md"]
