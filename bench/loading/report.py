"""What packing and loading take: the verdicts, and a result of ``bench_loading`` as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tables import markdown, not_idle, provenance, warnings

SHARDS = 2  # what a process may hold beyond the result
SHARE = 0.5  # of the disk's write rate
VERDICT = ("case", "what", "figure", "value", "asked", "reached")

Case = dict[str, Any]


def pack_rate(case: Case) -> float:
    """Bytes of the pack a second, median."""
    return statistics.median(each["pack"]["bytes"] / each["pack"]["seconds"] for each in case["rounds"])


def convert_rate(case: Case) -> float:
    """Bytes of the pack a second that one thread makes and nobody writes, median."""
    return statistics.median(each["convert"]["bytes"] / each["convert"]["seconds"] for each in case["rounds"])


def write_rate(case: Case, way: str) -> float:
    """Bytes a second, median."""
    return statistics.median(each["write"][way] for each in case["rounds"])


def share_of_disk(case: Case, way: str) -> float:
    """Median over rounds of packing over writing."""
    return statistics.median(
        each["pack"]["bytes"] / each["pack"]["seconds"] / each["write"][way] for each in case["rounds"]
    )


def beyond_result(case: Case) -> dict[str, int]:
    """The most that a process grew beyond what it was asked for: a pack is on the disk, a model stays in memory."""
    packing = max(each["pack"]["growth"] for each in case["rounds"])
    return {"packing": packing, "loading": case["load"]["growth"] - case["load"]["bytes"]}


def verdicts(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Of every case: memory beyond the result against two shards, and the packing rate against the disk's."""
    found = []
    for case in cases:
        allowed, name = SHARDS * case["largest_shard_bytes"], case["case"]
        memory = [(work, beyond, allowed, beyond <= allowed) for work, beyond in beyond_result(case).items()]
        shares = {way: share_of_disk(case, way) for way in ("direct", "cached")}
        rates = [(way, share, SHARE, share >= SHARE) for way, share in shares.items()]
        found += [dict(zip(VERDICT, (name, "memory", *row), strict=True)) for row in memory]
        found += [dict(zip(VERDICT, (name, "rate", *row), strict=True)) for row in rates]
    return found


def render(result: dict[str, Any]) -> str:
    """Warnings, conditions and a line a case."""
    parts = [_warnings(result), _conditions(result), sizes_and_rates(result["cases"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def sizes_and_rates(cases: Sequence[Case]) -> str:
    """Sizes, memory beyond the result in shards, and rates."""
    rows = [
        [
            "checkpoint",
            "of",
            "GB",
            "pack, GB",
            "packing holds",
            "loading holds beyond the model",
            f"at most {SHARDS} shards",
            "made by one thread, GB/s",
            "packed, GB/s",
            "of cached writes",
            "of direct writes",
        ]
    ]
    for case in cases:
        shard, beyond = case["largest_shard_bytes"], beyond_result(case)
        kept = max(beyond.values()) <= SHARDS * shard
        rows.append(
            [
                case["case"],
                case["model"],
                f"{case['checkpoint_bytes'] / 1e9:.2f}",
                f"{case['rounds'][0]['pack']['bytes'] / 1e9:.2f}",
                *(f"{nbytes / shard:.2f} shards" for nbytes in beyond.values()),
                "reached" if kept else "missed",
                *(f"{rate(case) / 1e9:.2f}" for rate in (convert_rate, pack_rate)),
                *(_share(case, way) for way in ("cached", "direct")),
            ]
        )
    return markdown(rows)


def _share(case: Case, way: str) -> str:
    share = share_of_disk(case, way)
    return f"{share:.2f}x of {write_rate(case, way) / 1e9:.2f} GB/s: {'reached' if share >= SHARE else 'missed'}"


def _warnings(result: dict[str, Any]) -> str:
    found = ["this is `--quick`: experts are small, and there is one round"] if result["quick"] else []
    found += not_idle(max(result["idle"].values()))
    return warnings(result, found)


def _conditions(result: dict[str, Any]) -> str:
    machine, disk = result["machine"], result["machine"]["disk"]
    rows = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_bytes'] / 2**30:.0f} GiB RAM, Linux "
        f"{machine['kernel']}; {disk['filesystem']} on {disk['source']}; others used {result['idle']['before']:.0%} of "
        f"the CPU time before, {result['idle']['after']:.0%} after.",
        provenance(result),
        "Checkpoints lie in the page cache. Rates are medians; `cached` and `direct` are plain writes of as many "
        f"bytes, through the page cache and past it, synced, in the same rounds. Asked: {SHARE:.0%} of them.",
    ]
    return "\n".join(f"- {row}" for row in rows)
