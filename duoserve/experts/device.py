"""Where fast memory is: the device, how much of it is free, and rows on it. N rows."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.host_ram import available_bytes
from duoserve.experts.rows import aligned_rows

CPU = torch.device("cpu")
LEAST_CAPABILITY = (8, 0)  # Triton makes no kernels for older GPUs


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means: "auto" is a GPU where there is one, and kernels run on it.

    ConfigError for one that is not there, is a GPU other than the first, or is too old.
    """
    if name == "auto":
        name = _automatic()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device: use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cpu":
        return CPU
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    current = torch.cuda.current_device() if found else 0
    index = current if device.index is None else device.index
    if index >= found:
        raise ConfigError(f"device={name!r} was asked for, but torch finds {found} CUDA devices: use 'auto' or 'cpu'")
    if index or current:  # Triton launches on the thread's current device, which is cuda:0 in every new thread
        raise ConfigError(
            f"device={name!r} means cuda:{index}, and cuda:{current} is the current device, but kernels run on cuda:0 "
            "alone: start the process with CUDA_VISIBLE_DEVICES naming that GPU only, and use 'cuda'"
        )
    if fault := _fault(index):
        raise ConfigError(f"device={name!r} cannot be had: {fault}: use device='cpu'")
    return torch.device("cuda", index)


def _automatic() -> str:
    """The name of a GPU where there is one, else of the CPU; warns of a GPU that is no use."""
    if not torch.cuda.is_available():
        return "cpu"
    if fault := _fault(torch.cuda.current_device()):
        warnings.warn(f"device='auto' is the CPU: {fault}", stacklevel=1)  # one place: Python shows it once
        return "cpu"
    return "cuda"


def _fault(index: int) -> str | None:
    """Why kernels do not run on this GPU, None if they do."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    has, needed = (".".join(map(str, one)) for one in (capability, LEAST_CAPABILITY))
    return f"cuda:{index} has compute capability {has}, but kernels need {needed} (Ampere) or newer"


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on ``device``, including what PyTorch keeps for later allocations."""
    if device.type == "cpu":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def new_rows(n: int, row_bytes: int, device: torch.device) -> Tensor:
    """Zeroed uint8 memory [n, row_bytes] on ``device``; MemoryBudgetError when it cannot be had."""
    if device.type == "cpu":
        return aligned_rows(n, row_bytes)
    try:
        return torch.zeros((n, row_bytes), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise MemoryBudgetError(
            f"{n} rows of {row_bytes} bytes need {n * row_bytes} bytes on {device}, which it refused ({error}); "
            "give the experts fewer slots"
        ) from error
