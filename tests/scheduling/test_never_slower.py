"""Prefetch must pay: never slower than LRU, nor than the same policy without guesses, whatever the predictor says."""

from __future__ import annotations

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from duoserve.replaying.foreseen import Future
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from duoserve.replaying.replay import replay
from duoserve.scheduling.policies import get_policy
from duoserve.traces.synthetic import RoutingCard, synthesize
from duoserve.traces.trace import Trace

SIZES = LayerSizes("small", 1_000_000, 8, 1_000_000, 64)
TOLERANCE = 1.01


class Fallible(Future):
    """Knows what comes, and of each layer's chances is wrong about as many as ``precision`` says; it may lie, too.

    What it says of itself is not what it is worth: it always claims ``claim``.
    """

    def __init__(self, trace: Trace, precision: float, claim: float, horizon: int, seed: int) -> None:
        super().__init__(list(trace), trace.meta.layers, trace.meta.num_experts)
        self.horizon = horizon
        self._precision = precision
        self._claim = claim
        self._rng = np.random.default_rng(seed)

    def predict(self, layer: int) -> np.ndarray:
        true_E = super().predict(layer)
        right = np.flatnonzero(true_E)
        kept = right[self._rng.random(len(right)) < self._precision]
        others = np.setdiff1d(np.arange(len(true_E)), right)
        made_up = self._rng.choice(others, min(len(others), len(right) - len(kept)), replace=False)
        said_E = np.zeros_like(true_E)
        said_E[kept] = said_E[made_up] = self._claim
        return said_E


@given(
    skew=st.floats(0, 1.5),
    request=st.floats(0, 2.5),
    memory=st.floats(0, 0.99),
    share=st.sampled_from([0.15, 0.25, 0.5, 0.8]),
    link=st.floats(8.5, 11.5),
    latency=st.sampled_from([0.0, 1e-5]),
    precision=st.sampled_from([0.0, 0.2, 0.35, 0.6, 0.8, 0.95, 1.0]),
    claim=st.sampled_from([0.3, 0.6, 0.95]),
    horizon=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # no shrinking: slow
def test_duoserve_is_never_slower(
    skew: float,
    request: float,
    memory: float,
    share: float,
    link: float,
    latency: float,
    precision: float,
    claim: float,
    horizon: int,
    seed: int,
) -> None:
    card = RoutingCard("random", 16, 2, 5, skew, request, 0.6, memory, 0.3, 0.5)
    trace = synthesize(card, requests=3, tokens=60, precision=0.5, seed=seed, prompt=16)
    machine = Machine(Hardware("random", 10**link, 1e11, 1e14, latency, 1e-4), SIZES)
    slots = int(share * 80)
    policy = get_policy("duoserve")
    teller = Fallible(trace, precision, claim, horizon, seed)
    ours = replay(trace, policy, machine, slots, predictor=teller)
    quiet = replay(trace, policy.without_guesses(), machine, slots)
    lru = replay(trace, get_policy("lru"), machine, slots)
    assert sum(ours.itl_s) <= TOLERANCE * sum(quiet.itl_s)
    assert ours.total_s <= TOLERANCE * quiet.total_s
    assert ours.total_s <= TOLERANCE * lru.total_s
