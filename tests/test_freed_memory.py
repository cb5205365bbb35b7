"""Buffers that are freed and taken again are not the system's in between: its pages would be cleared anew."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory by other rules"
)

COUNTED = """
import resource, sys, torch
from duoserve.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
if sys.argv[1] == "load":
    from duoserve import MoEModel
    MoEModel.from_pretrained("bard", device="cpu", max_context=64).close()
def buffers():
    return [torch.zeros(6 << 20, dtype=torch.uint8) for _ in range(4)]
buffers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    buffers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_taken(how: str) -> int:
    ran = subprocess.run([sys.executable, "-c", COUNTED, how], capture_output=True, text=True, check=True)
    return int(ran.stdout)


def test_freed_buffers_are_kept() -> None:
    taken_once = (24 << 20) // resource.getpagesize()
    assert pages_taken("keep") < taken_once < pages_taken("as it was")


def test_a_load_sees_to_it() -> None:
    assert pages_taken("load") < (24 << 20) // resource.getpagesize()
