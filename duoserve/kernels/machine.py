"""The properties of a device that a launch depends on."""

from __future__ import annotations

from functools import cache

import torch

from duoserve.kernels.checks import require
from duoserve.kernels.configs import INTERPRETER
from duoserve.kernels.numerics import interpreting

INTERPRETED_CTAS = 3  # enough to show a mistake in a persistent loop


@cache
def machine(device: torch.device) -> tuple[int, int]:
    """(architecture as in ``gemm_config``, number of SMs) of ``device``; raises KernelError if no kernel runs there."""
    if device.type != "cuda":
        require(interpreting(), f"Triton kernels need a GPU, not {device}, or TRITON_INTERPRET=1")
        return INTERPRETER, INTERPRETED_CTAS
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
