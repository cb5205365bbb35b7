"""Decode rates of batches, what they had to read, and that no batch changes a token."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ceilings import disk_rates, memory_rate
from duoserve import MoEModel, SamplingParams
from duoserve.config import Phase

SCRATCH_BYTES = 256 << 20


def _greedy(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)


def one_round(model: MoEModel, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, Any]:
    """One batch: seconds and bytes of its decode steps, and the experts that they used."""
    model.generate(list(prompts), _greedy(new_tokens))
    stats = model.stats
    steps = new_tokens - 1
    asked = stats.hits[Phase.DECODE] + stats.misses[Phase.DECODE]
    return {
        "step_s": sum(stats.itl_s) / len(stats.itl_s),
        "itl_s": stats.itl_s,
        "experts_per_step": asked / steps,
        "misses_per_step": stats.misses[Phase.DECODE] / steps,
    }


def decode_rounds(  # noqa: PLR0913, PLR0917
    model: MoEModel, prompts: Sequence[list[int]], batches: Sequence[int], new_tokens: int, rounds: int, cache: Path
) -> dict[str, Any]:
    """Every batch size in turn, ``rounds`` times after a warm-up; the ceilings; a row for each size."""
    played: dict[int, list[dict[str, Any]]] = {batch: [] for batch in batches}
    for turn in range(rounds + 1):
        for batch in batches:
            outcome = one_round(model, prompts[:batch], new_tokens)
            if turn:
                played[batch].append(outcome)
    ceilings = ceilings_of(model, cache)
    return {
        "rounds": {str(batch): found for batch, found in played.items()},
        "ceilings": ceilings,
        "rows": [row(batch, found, played[batches[0]], ceilings) for batch, found in played.items()],
    }


def ceilings_of(model: MoEModel, cache: Path) -> dict[str, Any]:
    """The rates of memory and, where experts wait there, of the disk; and what a step always reads."""
    plan, config = model.memory, model.config
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * config.dtype.itemsize
    disk = None
    if not plan.all_in_slots:
        pack = next(cache.rglob("experts.pack"))
        disk = max(disk_rates(pack, plan.slot_bytes)[0].values())
    return {
        "memory_bytes_per_s": memory_rate(SCRATCH_BYTES),
        "disk_bytes_per_s": disk,
        "slot_bytes": plan.slot_bytes,
        "dense_bytes": plan.dense_bytes - embedding,
    }


def row(
    batch: int, found: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]], ceilings: dict[str, Any]
) -> dict[str, Any]:
    """The figures of one batch size: medians over rounds, and the bound of what its steps read."""
    step_s = statistics.median(one["step_s"] for one in found)
    gaps = sorted(gap for one in found for gap in one["itl_s"])
    experts, misses = (
        statistics.median(one[name] for one in found) for name in ("experts_per_step", "misses_per_step")
    )
    speedups = [batch * one["step_s"] / many["step_s"] for one, many in zip(alone, found, strict=True)]
    memory_s = (ceilings["dense_bytes"] + experts * ceilings["slot_bytes"]) / ceilings["memory_bytes_per_s"]
    disk = ceilings["disk_bytes_per_s"]
    disk_s = 0.0 if disk is None else misses * ceilings["slot_bytes"] / disk
    bound_s = max(memory_s, disk_s)
    return {
        "batch": batch,
        "tok_s": batch / step_s,
        "step_ms": 1e3 * step_s,
        "itl_p95_ms": 1e3 * gaps[int(0.95 * (len(gaps) - 1))],
        "experts_per_step": experts,
        "misses_per_step": misses,
        "speedup": statistics.median(speedups),
        "speedup_range": [min(speedups), max(speedups)],
        "bound_ms": 1e3 * bound_s,
        "bound": "disk" if disk_s > memory_s else "memory",
        "over_bound": step_s / bound_s,
    }


def equal_tokens(model: MoEModel, prompts: Sequence[list[int]], new_tokens: int) -> int:
    """How many prompts have the same greedy tokens alone as in a batch of them all."""
    together = [done.token_ids for done in model.generate(list(prompts), _greedy(new_tokens))]
    alone = [model.generate(prompt, _greedy(new_tokens)).token_ids for prompt in prompts]
    return sum(a == b for a, b in zip(together, alone, strict=True))
