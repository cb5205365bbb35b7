"""duoserve: Mixture-of-Experts language models that do not fit in fast memory, at the speed that the link allows."""

from duoserve.errors import (
    CheckpointError,
    ClosedError,
    CompilerError,
    ConfigError,
    CopyError,
    DuoServeError,
    IntegrityError,
    KernelError,
    MemoryBudgetError,
    OverloadedError,
    RequestError,
    TraceError,
)
from duoserve.experts.budget import MemoryPlan
from duoserve.interface import Objectives, Piece, ServiceFigures, ServiceSettings, ServiceState, TokenLogprobs
from duoserve.metrics import Stats
from duoserve.moe_model import Completion, MoEModel
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.service.async_engine import AsyncEngine
from duoserve.service.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "ClosedError",
    "CompilerError",
    "Completion",
    "ConfigError",
    "CopyError",
    "DuoServeError",
    "IntegrityError",
    "KernelError",
    "MemoryBudgetError",
    "MemoryPlan",
    "MoEModel",
    "Objectives",
    "OverloadedError",
    "Piece",
    "Policy",
    "Predictor",
    "RequestError",
    "SamplingParams",
    "ServiceFigures",
    "ServiceSettings",
    "ServiceState",
    "Stats",
    "Stream",
    "TokenLogprobs",
    "TraceError",
    "get_policy",
]
