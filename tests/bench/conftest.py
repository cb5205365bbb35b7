"""What the tests of benches share: a bench that is run as a reader runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Ran(NamedTuple):
    """What a bench printed, and ``result``, which it left in the file ``out``."""

    out: Path
    printed: str
    result: dict[str, Any]


@pytest.fixture(scope="session")
def bench_result(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """Runs a bench with these words, and duoserve as it is here; AssertionError with its report where it fails."""

    def ran(bench: str, *words: str, seconds: float = 300, **env: str) -> Ran:
        out = tmp_path_factory.mktemp(bench) / "new" / "result.json"
        command = [sys.executable, str(ROOT / "bench" / f"{bench}.py"), "--json", str(out), *words]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        here = {**os.environ, "PYTHONPATH": path, **env}
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=here)
        assert done.returncode == 0, done.stdout + done.stderr
        return Ran(out, done.stdout, json.loads(out.read_text()))

    return ran
