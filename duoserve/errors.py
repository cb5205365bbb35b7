"""Every error that duoserve raises on purpose. A message says what happened, with the numbers, and what to change."""

from __future__ import annotations


class DuoServeError(Exception):
    """Base of all errors raised by duoserve."""


class ConfigError(DuoServeError):
    """A value of ``config.json`` or of an engine option is missing, unsupported or out of range."""


class CheckpointError(DuoServeError):
    """A checkpoint file or tensor is missing, malformed, or not what the architecture needs."""


class CutShortError(CheckpointError):
    """A file is shorter than its format or its own header says."""


class MemoryBudgetError(DuoServeError):
    """What must be in memory does not fit into the memory that is allowed or free."""


class CopyError(DuoServeError):
    """An expert could not be brought into its slot."""


class RequestError(DuoServeError):
    """A prompt or a sampling parameter cannot be served."""


class ClosedError(DuoServeError):
    """The model, store or engine was used after ``close()``."""


class IntegrityError(DuoServeError):
    """An invariant of the books of slots or pages is broken: a bug in duoserve, never the user's doing."""


class KernelError(DuoServeError, ValueError):
    """A kernel was given operands that it cannot compute with: a dtype, shape, stride, alignment or device."""


class CompilerError(DuoServeError, RuntimeError):
    """PyTorch's compiler, or the C++ compiler that it calls, has failed; the message is the first that it reports."""


class TraceError(DuoServeError):
    """A trace, or a predictor made from one, is malformed, cut short, or of another model."""


class OverloadedError(DuoServeError):
    """A request was refused because of others: the queue is full, or its objectives cannot be met behind them."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        """Copies, also in another process, are made with both arguments, which ``args`` does not keep."""
        return type(self), (str(self), self.retry_after_s)
