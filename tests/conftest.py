"""What must be settled before anything imports torch or triton.

Processes that test side by side share the cores, and without a GPU the Triton kernels run in Triton's interpreter.
"""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
