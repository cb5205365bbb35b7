"""Policies side by side: the same trace, machine and slots for each, and the oracle at the end of the scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from duoserve.errors import ConfigError
from duoserve.experts import budget
from duoserve.metrics import ByteCounts
from duoserve.scheduling.hardware import Machine
from duoserve.scheduling.policies import POLICIES, Policy, get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.replay import ORACLE, Replay, layer_belady_bytes, least_bytes, oracle_of, replay
from duoserve.scheduling.trace import Trace

# All that can be replayed with fewer slots than experts, from the baselines up.
CONTESTANTS = (*(name for name, policy in POLICIES.items() if not policy.all_resident), ORACLE)


def contestants(names: str) -> list[str]:
    """The policies of a list such as "lru,duoserve", or of "all"; ConfigError for a name that is not known."""
    if names == "all":
        return list(CONTESTANTS)
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name != ORACLE:
            get_policy(name)
    return chosen


def slot_count(wanted: str, trace: Trace) -> int:
    """Slots over all layers: a count, or a share of all experts as ``expert_slots`` has it, such as "25%".

    ConfigError if it cannot work.
    """
    total = trace.meta.num_experts * len(trace.meta.layers)
    try:
        count = budget.slot_count(wanted if wanted.endswith("%") else int(wanted), total)
    except (ValueError, ConfigError):
        raise ConfigError(f"slots {wanted!r} is neither a count nor a share such as 25%") from None
    if not trace.meta.top_k < count <= total:
        raise ConfigError(f"{wanted} is {count} slots, but must lie in {trace.meta.top_k + 1}..{total}")
    return count


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
        least, belady = (bound(trace, machine, num_slots) for bound in (least_bytes, layer_belady_bytes))
        for name in names:
            policy, predictor = contestant(name, trace, predictors)
            done = replay(trace, policy, machine, num_slots, predictor=predictor)
            done.least_bytes, done.layer_belady_bytes = least, belady
            yield done


def contestant(name: str, trace: Trace, predictors: Mapping[str, Predictor]) -> tuple[Policy, Predictor | None]:
    """A policy and its predictor, which knows nothing of these requests yet, unless it is the oracle's."""
    if name == ORACLE:
        return oracle_of(trace)
    policy = get_policy(name)
    return policy, deepcopy(predictors.get(policy.predictor or ""))


def figures(done: Replay) -> dict[str, Any]:
    """One row: mean seconds (``total_s``: of all requests), shares, and bytes for each decoded token.

    Flat and JSON-able.
    """
    score, tokens = done.score, max(1, done.num_tokens)
    kinds = {f"{kind}_bytes_per_token": getattr(done.bytes, kind) / tokens for kind in ByteCounts.__annotations__}
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
        "least_bytes_per_token": done.least_bytes,
        "layer_belady_bytes_per_token": done.layer_belady_bytes,
        "stall_s_per_token": done.decode_stall_s / tokens,
        "ttft_s": done.ttft_mean_s,
        "tpot_s": done.tpot_s,
        "itl_p50_s": done.itl_percentile_s(50),
        "itl_p95_s": done.itl_percentile_s(95),
        "itl_p99_s": done.itl_percentile_s(99),
        "total_s": done.total_s,
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.2f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "slots": ("slots", str),
    "policy": ("policy", str),
    "hit_rate": ("hits", _percent),
    "recall_at_k": ("recall@k", _percent),
    "exact_top_k": ("exact", _percent),
    "at_least_half": ("half", _percent),
    "demanded_bytes_per_token": ("MB demanded", _megabytes),
    "prefetched_useful_bytes_per_token": ("useful", _megabytes),
    "prefetched_late_bytes_per_token": ("late", _megabytes),
    "wasted_bytes_per_token": ("wasted", _megabytes),
    "least_bytes_per_token": ("least", _megabytes),
    "layer_belady_bytes_per_token": ("Belady/layer", _megabytes),
    "stall_s_per_token": ("stall ms", _milliseconds),
    "ttft_s": ("TTFT ms", _milliseconds),
    "tpot_s": ("TPOT ms", _milliseconds),
    "itl_p95_s": ("p95 ms", _milliseconds),
    "itl_p99_s": ("p99 ms", _milliseconds),
}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of ``figures`` as text, one line each below a heading; bytes are those of a decoded token."""
    cells = [[title for title, _ in _COLUMNS.values()]]
    cells += [["-" if row[key] is None else show(row[key]) for key, (_, show) in _COLUMNS.items()] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(_COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
