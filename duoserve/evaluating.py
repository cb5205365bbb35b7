"""From a trace of a model to the policy and predictor that serve it best on a machine: train, replay, recommend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duoserve.loading.recommendation import Recommendation
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.training import train
from duoserve.replaying.bake_off import bake_off, rows
from duoserve.replaying.hardware import Machine
from duoserve.replaying.replay import ORACLE, Replay, replay
from duoserve.scheduling.policies import POLICIES
from duoserve.traces.trace import Trace

BASELINES = ("on-demand", "lru")
GUESSING = ("activation-matrix", "lookahead", "duoserve")  # policies that make guesses
# Prefetch moves bytes and takes a predictor's time, which a replay does not see: it must gain this share.
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Evaluation:
    """The recommendation, its predictor, and a row of figures for each replay on the requests that were held out."""

    recommendation: Recommendation
    predictor: RowPredictor | None
    rows: list[dict[str, Any]]


def evaluate(
    trace: Trace, machine: Machine, slot_counts: Sequence[int], seed: int = 0, *, progress: bool = False
) -> Evaluation:
    """Trains predictors on most of the trace's requests, and replays BASELINES, GUESSING and the oracle on the others.

    The recommended policy has the least decode time over all ``slot_counts``. If it makes guesses, they stay only if
    they gain LEAST_GAIN. Raises TraceError if the trace has fewer than two prompts, or if no request decodes.
    """
    trace.check_decodes()
    predictors, held_out = _trained(trace, seed, progress)
    names = [*BASELINES, *GUESSING, ORACLE]
    runs = list(bake_off(held_out, machine, slot_counts, names, predictors))
    decode_s = {name: _decode_s(run for run in runs if run.policy == name) for name in names if name != ORACLE}
    best = min(decode_s, key=decode_s.__getitem__)
    kind = POLICIES[best].predictor
    if kind is None:
        recommendation = Recommendation(best, False, _why(best, False, decode_s, decode_s[best]))
        return Evaluation(recommendation, None, list(rows(runs, held_out, machine)))
    unguessed = [replay(held_out, POLICIES[best].without_guesses(), machine, slots) for slots in slot_counts]
    unguessed_s = _decode_s(unguessed)
    pays = decode_s[best] <= (1 - LEAST_GAIN) * unguessed_s
    recommendation = Recommendation(best, pays, _why(best, pays, decode_s, unguessed_s))
    return Evaluation(
        recommendation, predictors[kind] if pays else None, list(rows([*runs, *unguessed], held_out, machine))
    )


def _trained(trace: Trace, seed: int, progress: bool) -> tuple[dict[str, RowPredictor], Trace]:
    """Predictors by kind, one for each of GUESSING, and the requests that none was trained on.

    One seed holds out the same for all.
    """
    kinds = [kind for name in GUESSING if (kind := POLICIES[name].predictor) is not None]
    trained = {kind: train(trace, kind, seed=seed, progress=progress) for kind in kinds}
    _, held_out = next(iter(trained.values()))
    return {kind: predictor for kind, (predictor, _) in trained.items()}, trace.select(held_out)


def _decode_s(runs: Iterable[Replay]) -> float:
    return float(sum(sum(run.itl_s) for run in runs))


def _why(best: str, pays: bool, decode_s: dict[str, float], unguessed_s: float) -> str:
    """A paragraph on what to expect of ``best``, and whether its guesses pay; without them it takes ``unguessed_s``."""
    expected_s = decode_s[best] if pays else unguessed_s
    words = [
        f"Expect {best}{'' if pays else ' without prefetch'} to decode {decode_s['lru'] / expected_s:.2f} times as "
        f"fast as lru and {decode_s['on-demand'] / expected_s:.2f} times as fast as on-demand."
    ]
    if POLICIES[best].predictor is not None:
        gain = 1 - decode_s[best] / unguessed_s
        words.append(
            f"Its guesses {'save' if gain >= 0 else 'cost'} {abs(gain):.1%} of the decode time"
            + (
                ", so prefetch is on."
                if pays
                else f", less than the {LEAST_GAIN:.0%} that prefetch must gain: it is off."
            )
        )
    words.append("Prefetch creates no bandwidth: it only fills the time in which the link would be idle.")
    return " ".join(words)
