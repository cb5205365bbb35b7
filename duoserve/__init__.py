"""duoserve: Mixture-of-Experts language models that do not fit in fast memory, at the speed that the link allows."""

from duoserve.async_engine import AsyncEngine
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
    TraceError,
)
from duoserve.metrics import Stats
from duoserve.moe_model import Completion, MoEModel
from duoserve.sampling import SamplingParams
from duoserve.service import Objectives, Piece, ServiceFigures, ServiceSettings, State, TokenLogprobs
from duoserve.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "ClosedError",
    "Completion",
    "ConfigError",
    "CopyError",
    "DuoServeError",
    "IntegrityError",
    "MemoryBudgetError",
    "MoEModel",
    "Objectives",
    "OverloadedError",
    "Piece",
    "RequestError",
    "SamplingParams",
    "ServiceFigures",
    "ServiceSettings",
    "State",
    "Stats",
    "Stream",
    "TokenLogprobs",
    "TraceError",
]
