"""Predictors that say what a test wants them to, and routings for them to hear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from duoserve.config import Phase
from duoserve.scheduling.account import Account
from duoserve.scheduling.plan import GuessMode
from duoserve.scheduling.policies import POLICIES
from duoserve.scheduling.routing import Routing

STREAMING = tuple(name for name in POLICIES if name != "resident")
GUESSING = tuple(name for name in STREAMING if POLICIES[name].guesses is not GuessMode.NONE)


@contextmanager
def generous_link() -> Iterator[None]:
    """Within it every guess pays: where no time passes while a model computes, no link is idle, and none would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("duoserve.scheduling.foresight.affordable", lambda guesses, *_: list(guesses))
        patch.setattr(Account, "allows", lambda *_: 1000)
        yield


def routed(layer: int, experts: Sequence[int]) -> Routing:
    """One token chose ``experts``."""
    ids_TK = np.array([experts], dtype=np.int64)
    return Routing(layer, np.zeros(1, dtype=np.int64), ids_TK, np.ones(ids_TK.shape, dtype=np.float32), {})


class Teller:
    """Says ``tell(layer)``: the chance of each expert."""

    name = "teller"
    lookahead = 0

    def __init__(self, tell: Callable[[int], np.ndarray], horizon: int = 1) -> None:
        self.tell = tell
        self.horizon = horizon
        self.heard: list[int] = []  # the layers, -1 where a pass begins

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        self.heard.append(-1)

    def observe(self, routing: Routing) -> None:
        self.heard.append(routing.layer)

    def predict(self, layer: int) -> np.ndarray:
        return self.tell(layer).astype(np.float32)


def certain(num_experts: int, experts: Sequence[int], chance: float = 0.95) -> np.ndarray:
    """``chance`` for these experts, nothing for the others."""
    chances_E = np.zeros(num_experts)
    chances_E[list(experts)] = chance
    return chances_E


class Liar(Teller):
    """Hears what the routers choose and predicts everything else, with certainty; ``lookahead`` reaches too far."""

    lookahead = 3

    def __init__(self, horizon: int) -> None:
        super().__init__(self._lie, horizon)
        self._last: dict[int, Routing] = {}

    def observe(self, routing: Routing) -> None:
        super().observe(routing)
        assert all(scores_TE.shape == (len(routing.topk_ids_TK), 8) for scores_TE in routing.ahead.values())
        self._last[routing.layer] = routing

    def _lie(self, layer: int) -> np.ndarray:
        wanted = self._last[layer].topk_ids_TK.ravel() if layer in self._last else []
        return 1.0 - certain(8, wanted, 1.0)


def any_teller(kind: str, seed: int, horizon: int) -> Teller:
    """One that lies on purpose, or one that says anything."""
    rng = np.random.default_rng(seed)
    return Liar(horizon) if kind == "liar" else Teller(lambda layer: rng.random(8), horizon)
