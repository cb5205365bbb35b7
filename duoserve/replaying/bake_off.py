"""Replays policies side by side, the oracle too: all on the same trace and machine, with the same slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import Any

from duoserve.replaying.hardware import Machine
from duoserve.replaying.replay import ORACLE, Replay, layer_belady_bytes, least_bytes, oracle_of, replay
from duoserve.scheduling.policies import POLICIES, Policy, get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.traces.trace import Trace

# All that can be replayed with fewer slots than experts, from the baselines up.
CONTESTANTS = (*(name for name, policy in POLICIES.items() if not policy.all_resident), ORACLE)
# To hold a row's bytes against: what nothing can go below, and those of caches that know the future.
BOUNDS = {"least_bytes_per_token": least_bytes, "layer_belady_bytes_per_token": layer_belady_bytes}


def bake_off(
    trace: Trace,
    machine: Machine,
    slot_counts: Sequence[int],
    names: Sequence[str],
    predictors: Mapping[str, Predictor],
) -> Iterator[Replay]:
    """A replay for each slot count and policy, in that order.

    ``predictors`` are by kind. A policy whose kind is not among them goes without guesses: its ``predictor`` is None.
    """
    for num_slots in slot_counts:
        for name in names:
            policy, predictor = contestant(name, trace, predictors)
            yield replay(trace, policy, machine, num_slots, predictor=predictor)


def contestant(name: str, trace: Trace, predictors: Mapping[str, Predictor]) -> tuple[Policy, Predictor | None]:
    """A policy and its predictor, which knows nothing of these requests yet, unless it is the oracle's."""
    if name == ORACLE:
        return oracle_of(trace)
    policy = get_policy(name)
    return policy, deepcopy(predictors.get(policy.predictor or ""))


def rows(runs: Iterable[Replay], trace: Trace, machine: Machine) -> Iterator[dict[str, Any]]:
    """The figures of each of these replays of ``trace`` on ``machine``."""
    bounds: dict[int, dict[str, float]] = {}
    for done in runs:
        if done.num_slots not in bounds:
            bounds[done.num_slots] = {name: bound(trace, machine, done.num_slots) for name, bound in BOUNDS.items()}
        yield figures(done, bounds[done.num_slots])


def figures(done: Replay, bounds: Mapping[str, float]) -> dict[str, Any]:
    """One row: mean seconds (``total_s``: of all requests), shares, and bytes for each decoded token; and ``bounds``.

    Flat and JSON-able.
    """
    score, tokens = done.score, max(1, done.num_tokens)
    kinds = {f"{kind}_bytes_per_token": nbytes / tokens for kind, nbytes in asdict(done.bytes).items()}
    return {
        "policy": done.policy,
        "predictor": done.predictor,
        "slots": done.num_slots,
        "hit_rate": done.hit_rate,
        "recall_at_k": None if score is None else score.recall,
        "exact_top_k": None if score is None else score.exact_share,
        "at_least_half": None if score is None else score.half_share,
        **kinds,
        "bytes_per_token": done.bytes.total / tokens,
        **bounds,
        "stall_s_per_token": done.decode_stall_s / tokens,
        "ttft_s": done.ttft_mean_s,
        "tpot_s": done.tpot_s,
        "itl_p50_s": done.itl_percentile_s(50),
        "itl_p95_s": done.itl_percentile_s(95),
        "itl_p99_s": done.itl_percentile_s(99),
        "total_s": done.total_s,
    }
