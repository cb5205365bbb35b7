"""What must be settled before anything imports torch or triton.

Processes that test side by side share the cores, and without a GPU the Triton kernels run in Triton's interpreter.
"""

import os

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# They take minutes each: were one begun last, it would keep one worker at it and the others waiting.
LONGEST = (
    "test_compiled.py",
    "test_bench.py",
    "test_compiled_batches.py",
    "test_token_expert.py",
    "test_machine_code.py",
    "test_quantize.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Files go to workers in the order that they have here, not by how many tests they have."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
