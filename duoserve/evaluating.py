"""From a trace of a model to the policy and predictor that serve it best on a machine: train, replay, choose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duoserve.choice import BestPolicy
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.training import train
from duoserve.scheduling.bake_off import bake_off, rows
from duoserve.scheduling.hardware import Machine
from duoserve.scheduling.policies import POLICIES
from duoserve.scheduling.replay import ORACLE, Replay, replay
from duoserve.scheduling.trace import Trace

KINDS = ("activation-matrix", "lookahead", "duoserve")
BASELINES = ("on-demand", "lru")
# Prefetch moves bytes and takes a predictor's time, which a replay does not see: it must gain this much.
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Evaluation:
    """``choice``, its predictor, and a row of figures for each replay on the requests that were held out."""

    choice: BestPolicy
    predictor: RowPredictor | None
    rows: list[dict[str, Any]]


def evaluate(
    trace: Trace, machine: Machine, slot_counts: Sequence[int], seed: int = 0, *, progress: bool = False
) -> Evaluation:
    """Trains predictors on most of the trace's requests, and replays BASELINES, KINDS and the oracle on the others.

    The choice is the policy of the least decode time over all ``slot_counts``; if that is one that makes guesses, they
    stay only if they gain LEAST_GAIN. TraceError for a trace of less than two prompts, or where no request
    decodes.
    """
    trace.check_decodes()
    trained = {kind: train(trace, kind, seed=seed, progress=progress) for kind in KINDS}
    predictors = {kind: predictor for kind, (predictor, _) in trained.items()}
    held = trace.select(next(iter(trained.values()))[1])
    names = [*BASELINES, *KINDS, ORACLE]
    runs = list(bake_off(held, machine, slot_counts, names, predictors))
    totals = {name: _decode_s(run for run in runs if run.policy == name) for name in names if name != ORACLE}
    best = min(totals, key=totals.__getitem__)
    kind = POLICIES[best].predictor
    if kind is None:
        return Evaluation(_explained(best, False, totals, totals[best]), None, list(rows(runs, held, machine)))
    policy = POLICIES[best].without_guesses()
    quiet_runs = [replay(held, policy, machine, slots) for slots in slot_counts]
    quiet_s = _decode_s(quiet_runs)
    pays = totals[best] <= (1 - LEAST_GAIN) * quiet_s
    made = list(rows([*runs, *quiet_runs], held, machine))
    return Evaluation(_explained(best, pays, totals, quiet_s), predictors[kind] if pays else None, made)


def _decode_s(runs: Iterable[Replay]) -> float:
    return float(sum(sum(run.itl_s) for run in runs))


def _explained(best: str, pays: bool, totals: dict[str, float], quiet_s: float) -> BestPolicy:
    """The choice, with a paragraph on what to expect and why."""
    expected = totals[best] if pays else quiet_s
    words = [
        f"Expect {best}{'' if pays else ' without prefetch'} to decode {totals['lru'] / expected:.2f} times as fast as "
        f"lru and {totals['on-demand'] / expected:.2f} times as fast as on-demand."
    ]
    if POLICIES[best].predictor is not None:
        gain = 1 - totals[best] / quiet_s
        words.append(
            f"Its guesses {'save' if gain >= 0 else 'cost'} {abs(gain):.1%} of the decode time"
            + (
                ", so prefetch is on."
                if pays
                else f", less than the {LEAST_GAIN:.0%} that prefetch must gain: it is off."
            )
        )
    words.append("Prefetch creates no bandwidth: it only fills the time in which the link would be idle.")
    return BestPolicy(best, pays, " ".join(words))
