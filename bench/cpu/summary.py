"""From the raw rounds of ``bench_cpu`` to rates, paired ratios, bounds, correctness checks and verdicts.

    PYTHONPATH=bench python -m cpu.summary RESULT.json

makes the bounds and verdicts of a result anew, from its rounds and ceilings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpu.checks import byte_checks, clock_checks, logit_checks, token_checks
from cpu.rows import (
    BF12,
    COMPILED,
    LLAMA,
    LLAMA_DISK,
    LLAMA_Q4,
    LLAMA_Q8,
    OURS,
    OURS_DISK,
    OURS_QUANTIZED,
    PEER_DISK,
    PEER_DISK_EQUAL,
    PEER_DISK_WARM,
    PEERS,
    POLICIES,
    REFERENCE,
    Rounds,
    decode_bytes,
    decode_io,
    tpots,
    ttfts,
)
from cpu.targets import targets
from harness import Round, Summary
from shapes import Shape


def summarize(shape: Shape, raw: dict[str, Any], filesystem: str, scratch: Path) -> dict[str, Any]:
    """``summary``, ``ratios``, ``routing_overlap``, ``checks`` of a run's raw figures, and what ``judged`` makes."""
    resident, disk = raw["rounds"]["resident"], raw["rounds"]["disk"]
    return {
        "summary": {name: rates(shape, rounds) for name, rounds in (resident | disk).items()},
        "ratios": ratios(resident, disk),
        "routing_overlap": routing_overlap(shape, raw["token_ids"], raw["routing"]),
        "checks": [
            *token_checks(resident | disk, raw["token_ids"]),
            *logit_checks(resident | disk, scratch),
            *byte_checks(shape, disk, on_a_disk=filesystem not in ("tmpfs", "ramfs")),
            *clock_checks(resident | disk),
        ],
    } | judged(shape, raw)


def judged(shape: Shape, raw: dict[str, Any]) -> dict[str, Any]:
    """``disk_best``, ``memory_best``, ``bounds`` and ``targets``."""
    bounds = bounds_of(shape, raw)
    return {
        "disk_best": disk_best(raw),
        "memory_best": memory_best(shape, raw),
        "bounds": bounds,
        "targets": [target.to_dict() for target in targets(shape, raw, bounds)],
    }


def disk_best(raw: dict[str, Any]) -> dict[str, Any]:
    """The best ``bytes_per_s`` that the disk was seen at, and ``by`` whom: a probe, or an engine in a whole phase.

    An engine's bytes are those that the kernel counted, and its seconds the clock's, whatever else was in them: what it
    reached so can be reached.
    """
    seen = [(rate, f"the probe, {threads} threads") for threads, rate in raw["ceilings"]["disk_bytes_per_s"].items()]
    for name, rounds in raw["rounds"]["disk"].items():
        for played in rounds:
            seen.append((played["prefill_read"] / played["ttft_s"], f"{name}, a prompt"))
            seen.append((played["decode_read"] / sum(played["itl_s"]), f"{name}, decode"))
    rate, by = max(seen)
    return {"bytes_per_s": rate, "by": by}


def memory_best(shape: Shape, raw: dict[str, Any]) -> dict[str, Any]:
    """The best ``bytes_per_s`` that memory was seen at, and ``by`` whom: a probe, or an engine in a whole decode."""
    ceilings, resident = raw["ceilings"], raw["rounds"]["resident"]
    seen = [(rate, f"the probe, {dtype} by one row") for dtype, rate in ceilings["gemv_bytes_per_s"].items()]
    seen.append((ceilings["memory_bytes_per_s"], "the probe"))
    for name in (OURS, COMPILED, *PEERS, LLAMA):
        seen += [(shape.active_bytes / tpot, f"{name}, decode") for tpot in tpots(resident.get(name, ()))]
    rate, by = max(seen)
    return {"bytes_per_s": rate, "by": by}


def rates(shape: Shape, rounds: Sequence[Round]) -> dict[str, Any]:
    """What the tables show of one contestant."""
    per_token = shape.new_tokens - 1
    hit_rates = [r["stats"].get("hit_rate_decode") for r in rounds]
    return {
        "prefill_tok_s": asdict(Summary.of([shape.prompt_tokens / s for s in ttfts(rounds)])),
        "decode_tok_s": asdict(Summary.of([1 / s for s in tpots(rounds)])),
        "ttft_s": asdict(Summary.of(ttfts(rounds))),
        "tpot_s": asdict(Summary.of(tpots(rounds))),
        "prefill_read_mb": asdict(Summary.of([r["prefill_read"] / 1e6 for r in rounds])),
        "decode_read_mb_per_token": asdict(Summary.of([r["decode_read"] / 1e6 / per_token for r in rounds])),
        "decode_hit_rate": None if None in hit_rates else statistics.median(hit_rates),
        "foreign_cpu": max(r["foreign_cpu"] for r in rounds),
    }


def ratios(resident: Rounds, disk: Rounds) -> list[dict[str, Any]]:
    """Speed of ours over theirs, by pairs of rounds; only of what was measured."""
    pairs = [(ours, peer, resident) for ours in (OURS, COMPILED, BF12) for peer in (*PEERS, REFERENCE, LLAMA)]
    int8, int4 = (OURS_QUANTIZED[format] for format in ("int8", "int4"))
    pairs += [(int8, LLAMA_Q8, resident), (int4, LLAMA_Q8, resident), (int4, LLAMA_Q4, resident)]
    peers = (PEER_DISK, PEER_DISK_EQUAL, PEER_DISK_WARM, LLAMA_DISK)
    pairs += [(ours, peer, disk) for ours in (OURS_DISK, *POLICIES) for peer in peers]
    return [
        {
            "ours": ours,
            "theirs": theirs,
            "prefill": asdict(Summary.of_pairs(ttfts(group[theirs]), ttfts(group[ours]))),
            "decode": asdict(Summary.of_pairs(tpots(group[theirs]), tpots(group[ours]))),
        }
        for ours, theirs, group in pairs
        if ours in group and theirs in group
    ]


def bounds_of(shape: Shape, raw: dict[str, Any]) -> dict[str, float]:
    """What the ceilings allow, in seconds; of the disk's only what was read counts, so a better policy lowers it."""
    ceilings, resident, disk = raw["ceilings"], raw["rounds"]["resident"], raw["rounds"]["disk"]
    found = {
        "resident_prefill_s": shape.prefill_flop / max(ceilings["matmul_flop_per_s"].values()),
        "resident_decode_s": shape.active_bytes / memory_best(shape, raw)["bytes_per_s"],
    }
    rate = disk_best(raw)["bytes_per_s"]
    for name in (name for name in POLICIES if name in disk):
        nbytes = statistics.median(decode_bytes(played) for played in disk[name])
        found[decode_io(name)] = nbytes / (rate * (shape.new_tokens - 1))
    if OURS_DISK in disk:
        prefill_bytes = statistics.median(r["prefill_stats"]["bytes_total"] for r in disk[OURS_DISK])
        misses = statistics.median(r["stats"]["misses_decode"] for r in disk[OURS_DISK]) / (shape.new_tokens - 1)
        found |= {
            "disk_prefill_io_s": prefill_bytes / rate,
            "disk_prefill_compute_s": statistics.median(ttfts(resident[OURS])),
            "disk_decode_io_s": misses * shape.slot_bytes / rate,
            "disk_decode_compute_s": statistics.median(tpots(resident[OURS])),
        }
    return found


def routing_overlap(shape: Shape, token_ids: list[int], routing: list[list[list[int]]] | None) -> dict[str, Any] | None:
    """How the decoded tokens route: a degenerate model would make caching look better than it is."""
    if routing is None:
        return None
    pairs = [len({*a, *b}) for layer in routing for a, b in itertools.pairwise(layer)]
    return {
        "distinct_tokens": len(set(token_ids)),
        "tokens": len(token_ids),
        "mean_distinct_experts_of_2_tokens": statistics.fmean(pairs),
        "if_chosen_evenly": 2 * shape.top_k - shape.top_k**2 / shape.experts,
    }


def main() -> None:
    """Writes the result anew, with bounds and verdicts of its own figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what bench_cpu.py --json wrote")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    result |= judged(Shape(**result["shape"]), result)
    args.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
