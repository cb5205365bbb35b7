"""Parses what replays are asked for on the command line, and writes their figures as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duoserve.errors import ConfigError
from duoserve.experts import budget
from duoserve.replaying.bake_off import CONTESTANTS
from duoserve.replaying.replay import ORACLE
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import get_policy


def contestants(names: str) -> list[str]:
    """The policies of a list such as "lru,duoserve", or of "all"; raises ConfigError for an unknown name."""
    if names == "all":
        return list(CONTESTANTS)
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name != ORACLE:
            get_policy(name)
    return chosen


def slot_counts(listed: str, shape: ModelShape) -> list[int]:
    """The numbers of slots of a list such as "64,25%": counts, or shares of all experts, as in ``expert_slots``.

    Raises ConfigError for a number that cannot work.
    """
    return [_slot_count(wanted.strip(), shape) for wanted in listed.split(",")]


def _slot_count(wanted: str, shape: ModelShape) -> int:
    total = shape.total_experts
    try:
        count = budget.slot_count(wanted if wanted.endswith("%") else int(wanted), total)
    except (ValueError, ConfigError):
        raise ConfigError(f"slots {wanted!r} is neither a count nor a share such as 25%") from None
    if not shape.top_k < count <= total:
        raise ConfigError(f"{wanted} is {count} slots, but must lie in {shape.top_k + 1}..{total}")
    return count


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
    """Rows of ``figures`` as lines of text below a heading; bytes are per decoded token."""
    cells = [[title for title, _ in _COLUMNS.values()]]
    cells += [["-" if row[key] is None else show(row[key]) for key, (_, show) in _COLUMNS.items()] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(_COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
