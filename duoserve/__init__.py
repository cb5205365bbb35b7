"""duoserve: Mixture-of-Experts language models that do not fit in fast memory, at the speed that the link allows."""

from duoserve.errors import (
    CheckpointError,
    ClosedError,
    ConfigError,
    CopyError,
    DuoServeError,
    IntegrityError,
    MemoryBudgetError,
    OverloadedError,
    RequestError,
)
from duoserve.metrics import Stats
from duoserve.moe_model import Completion, MoEModel
from duoserve.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ClosedError",
    "Completion",
    "ConfigError",
    "CopyError",
    "DuoServeError",
    "IntegrityError",
    "MemoryBudgetError",
    "MoEModel",
    "OverloadedError",
    "RequestError",
    "SamplingParams",
    "Stats",
]
