"""What the device and the host did in decode steps, as a Chrome trace: chrome://tracing and Perfetto show it.

Only what a timeline needs is kept, so that a result file can hold it.
"""

from __future__ import annotations

import base64
import gzip
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from serve.models import Unavailable

Event = dict[str, Any]

KERNEL = "kernel"
KINDS = {KERNEL, "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver", "cpu_op", "user_annotation"}
KEPT = ("ph", "cat", "name", "pid", "tid", "ts", "dur")
NAME_LENGTH = 80  # of a kernel, whose template arguments may be longer than all else


def timeline(steps: Mapping[str, Callable[[], object]], device: torch.device) -> list[Event]:
    """What happened in each of ``steps``, one after another, beneath its name; times in microseconds.

    All in one session, for in a process the profiler may see nothing of a device the second time. Unavailable where
    it does not even see the first.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        for name, step in steps.items():
            with record_function(name):
                step()
                if on_gpu:
                    torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text())["traceEvents"]
    found = [_brief(event) for event in events if event.get("ph") == "X" and event.get("cat") in KINDS]
    if on_gpu and not any(event["cat"] == KERNEL for event in found):
        raise Unavailable("the profiler has seen no kernel of the device")
    return found


def _brief(event: Event) -> Event:
    kept = {key: event[key] for key in KEPT if key in event}
    return kept | {"name": kept["name"][:NAME_LENGTH]}


def packed(events: list[Event]) -> str:
    """A Chrome trace of ``events``, for a result file: gzip in base64."""
    trace = json.dumps({"traceEvents": events}, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(trace, mtime=0)).decode()


def write(trace: str, path: Path) -> None:
    """What ``packed`` gave, as a file named ``.json.gz``, which both viewers open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(trace))
