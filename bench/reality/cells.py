"""The real runs of ``bench_reality``: a policy with its slots, served request by request."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duoserve.config import EngineConfig
from duoserve.loading.load import load
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import RoutingListener


@dataclass
class Served:
    """One request: seconds to its first token and between the others, and the engine's own figures."""

    ttft_s: float
    itl_s: list[float]
    token_ids: list[int]
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def tpot_s(self) -> float:
        """Mean seconds between two tokens."""
        return sum(self.itl_s) / len(self.itl_s)


@dataclass(frozen=True)
class Setting:
    """How the models of a bench are loaded."""

    model: str
    cache: Path
    max_context: int
    copy_threads: int


class Cell:
    """``policy`` with ``slots``, loaded from disk with no expert in its slots, unless it keeps all of them there.

    ``served`` is for the caller to fill.
    """

    def __init__(  # noqa: PLR0913
        self,
        setting: Setting,
        policy: str,
        slots: int,
        resources: ExitStack,
        *,
        predictor: Predictor | None = None,
        listener: RoutingListener | None = None,
    ) -> None:
        wanted = EngineConfig(
            device="cpu",
            expert_slots=slots,
            host_memory=None,
            max_context=setting.max_context,
            copy_threads=setting.copy_threads,
        )
        self.policy, self.slots, self.predictor = policy, slots, predictor
        runtime = load(setting.model, wanted, policy, setting.cache, listener, predictor=deepcopy(predictor))
        self._runtime = resources.enter_context(closing(runtime))
        self.served: list[Served] = []

    def serve(self, prompt: Sequence[int], new_tokens: int) -> Served:
        """One request, greedy, with all its tokens."""
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        tokens = [token for _, token in self._runtime.engine.generate([Request(list(prompt), params)])]
        stats = self._runtime.meter.snapshot()
        assert stats.ttft_s is not None
        return Served(stats.ttft_s, stats.itl_s, tokens, stats.to_dict())
