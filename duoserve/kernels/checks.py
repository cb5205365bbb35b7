"""What the ops check before a launch, so that no operand can make a kernel read or write where it must not."""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.errors import KernelError


def require(holds: bool, message: str) -> None:
    """Raises KernelError with ``message`` unless ``holds``."""
    if not holds:
        raise KernelError(message)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises KernelError unless ``tensor`` has one of ``dtypes``, and ``shape``, where None stands for any size."""
    require(tensor.dtype in dtypes, f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    fits = len(shape) == tensor.ndim and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    require(fits, f"{name} has shape {tuple(tensor.shape)}; it must be {_show(shape)}")


def check_contiguous(**tensors: Tensor) -> None:
    """Raises KernelError unless every tensor is contiguous."""
    for name, tensor in tensors.items():
        require(tensor.is_contiguous(), f"{name} must be contiguous; its strides are {tensor.stride()}")


def check_one_device(**tensors: Tensor) -> None:
    """Raises KernelError unless all tensors are on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    require(len(set(devices.values())) == 1, f"all operands must be on one device, but they are on {devices}")


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
