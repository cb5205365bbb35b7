"""Neither loading a model nor giving it to a service leaves OpenMP threads to the calling thread: they take cores."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, threading
import torch
from duoserve import MoEModel
from duoserve.errors import MemoryBudgetError

def others():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

torch.set_num_threads(4)
before = others()
torch.ones(1 << 20).add_(1)
assert others() == before + 3, "torch has no team of four"
load = lambda: MoEModel.from_pretrained("bard", device="cpu", dtype="float32", max_context=64)
{load}
assert others() == before, (others(), before)
torch.ones(1 << 20).add_(1)
assert others() == before + 3
"""
LOADS = {
    "loaded": "load().close()",
    "served": """
from duoserve import AsyncEngine
model = load()
torch.ones(1 << 20).add_(1)
assert others() == before + 3
engine = AsyncEngine(model)
""",
    "refused": """
import duoserve.loading.load
def refuse(*_): raise MemoryBudgetError("no")
duoserve.loading.load.Engine = refuse
try: load()
except MemoryBudgetError: pass
else: raise SystemExit("it was loaded")
""",
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_loading_leaves_no_team(load: str) -> None:
    """In a process of its own, whose threads can be counted."""
    subprocess.run([sys.executable, "-c", SCRIPT.format(load=load)], check=True, timeout=120)
