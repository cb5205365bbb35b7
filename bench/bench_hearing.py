"""How long a decode step waits for its predictor to think: real thoughts in a replay, whose clock is virtual.

    python bench/bench_hearing.py [--rounds 3]

The scheduler and the predictor are the real ones; what the predictor takes on this machine passes on the replay's
clock, and nothing else of the host does. TPOT of the same replay without that is the floor. A step waits least if
thoughts pass while the link or the device has something to do. Traces are made up (duoserve/traces/synthetic.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from duoserve.config import Phase
from duoserve.planning.model_cards import find_model
from duoserve.planning.sizes import layer_sizes
from duoserve.predictors.training import train
from duoserve.replaying.hardware import Machine, find_hardware
from duoserve.replaying.replay import replay
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import Routing
from duoserve.traces.synthetic import CARDS, synthesize
from machine import conditions
from tables import markdown

TOKENS, SHARE, PRECISION = 32, 0.25, 0.8


class Case(NamedTuple):
    """A model with slots for a quarter of its experts, which are in ``form``."""

    model: str
    form: str
    hardware: str


CASES = [
    Case(*model, gpu) for model in (("qwen3-30b-a3b", "fp8"), ("mixtral-8x7b", "int4")) for gpu in ("h100", "rtx4090")
]


class Thinking:
    """``inner``, and for how many ``seconds`` it has thought so far."""

    def __init__(self, inner: Predictor) -> None:
        self._inner = inner
        self.name, self.horizon, self.lookahead = inner.name, inner.horizon, inner.lookahead
        self.seconds = 0.0

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """As in Predictor."""
        self._inner.begin(phase, requests_T)

    def observe(self, routing: Routing) -> None:
        """As in Predictor."""
        begun = time.perf_counter()
        self._inner.observe(routing)
        self.seconds += time.perf_counter() - begun

    def predict(self, layer: int) -> np.ndarray:
        """As in Predictor."""
        begun = time.perf_counter()
        chances_E = self._inner.predict(layer)
        self.seconds += time.perf_counter() - begun
        return chances_E


def measure(case: Case) -> dict[str, float]:
    """Milliseconds of a step: at best, with the predictor's thoughts, and these by themselves."""
    card = CARDS[case.model]
    trace = synthesize(card, 4, TOKENS, PRECISION, seed=3, prompt=64)
    inner, _ = train(trace.select([2, 3]), "lookahead")
    sizes = layer_sizes(find_model(case.model), case.form)
    held, machine = trace.select([0, 1]), Machine(find_hardware(case.hardware), sizes)
    slots, policy, predictor = int(SHARE * card.num_experts * card.num_layers), get_policy("duoserve"), Thinking(inner)
    best = replay(held, policy, machine, slots, predictor=inner)
    predictor.seconds = 0.0
    real = replay(held, policy, machine, slots, predictor=predictor, host_clock=lambda: predictor.seconds)
    thought_s = predictor.seconds / real.num_tokens
    return {"floor": 1e3 * (best.tpot_s or 0), "tpot": 1e3 * (real.tpot_s or 0), "thoughts": 1e3 * thought_s}


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all cases (default %(default)s)")
    rounds = parser.parse_args().rounds
    turns = [[measure(case) for case in CASES] for _ in range(rounds)]
    rows = [["model, hardware", "thoughts, ms a step", "TPOT, ms", "floor, ms", "of the thoughts waited for"]]
    for at, case in enumerate(CASES):
        found: dict[str, Any] = {key: statistics.median(turn[at][key] for turn in turns) for key in turns[0][at]}
        waited = (found["tpot"] - found["floor"]) / found["thoughts"]
        shown = [f"{found[key]:.2f}" for key in ("thoughts", "tpot", "floor")]
        rows.append([f"{case.model}, {case.hardware}", *shown, f"{waited:.0%}"])
    where = conditions("bench_hearing", quick=False)
    print(f"- {where['machine']['cpu']}; {where['date']}; `{where['command']}`.\n")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
