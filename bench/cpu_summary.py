"""From the raw rounds of ``bench_cpu`` to rates, paired ratios, bounds, correctness checks and verdicts.

T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import Round, Summary, Target
from shapes import Shape
from torch import Tensor

Rounds = dict[str, list[Round]]
OURS, OURS_DISK = "duoserve resident", "duoserve lru"
PEERS = ("transformers grouped_mm", "transformers eager")
PEER_DISK, PEER_DISK_WARM = "accelerate cold", "accelerate warm"
PEER_DISK_EQUAL = "accelerate cold, a quarter in RAM"
REFERENCE = "transformers float32"
# Beside transformers' own bf16 error against float32: two correct engines differ by rounding, and rounding moves a near
# tie of the router now and then, so the bulk of the tokens is judged and the mean is only shown.
LOGIT_ERROR_ALLOWANCE = 1.25
MEMORY_ALLOWANCE_MB = 200.0
# A peer's argmax may differ where two logits all but tie; one that computes something else hardly ever agrees.
PEER_AGREEMENT = 0.75
# A policy that prefetches for the next token leaves some reads of one request to be counted in the next.
READ_SHARE = 0.95
OWN_CLOCK_SHARE, OWN_CLOCK_S = 0.05, 1e-3  # of the time outside, and per token: text and bookkeeping are outside only


def logits_file(scratch: Path, name: str) -> Path:
    """Where the logits of a contestant wait for the comparison."""
    return scratch / f"{name.replace(' ', '-')}.pt"


def summarize(shape: Shape, raw: dict[str, Any], filesystem: str, scratch: Path) -> dict[str, Any]:
    """``summary``, ``ratios``, ``bounds``, ``routing_overlap``, ``checks`` and ``targets`` of a run's raw figures."""
    resident, disk = raw["rounds"]["resident"], raw["rounds"]["disk"]
    bounds = bounds_of(shape, raw)
    return {
        "summary": {name: rates(shape, rounds) for name, rounds in (resident | disk).items()},
        "ratios": ratios(resident, disk),
        "bounds": bounds,
        "routing_overlap": routing_overlap(shape, raw["token_ids"], raw["routing"]),
        "checks": [
            *token_checks(resident | disk, raw["token_ids"]),
            *logit_checks(resident | disk, scratch),
            *byte_checks(shape, disk, on_a_disk=filesystem not in ("tmpfs", "ramfs")),
            *clock_checks(resident | disk),
        ],
        "targets": [target.to_dict() for target in targets(shape, raw, bounds)],
    }


def ttfts(rounds: Iterable[Round]) -> list[float]:
    """Seconds to the first token, round by round."""
    return [r["ttft_s"] for r in rounds]


def tpots(rounds: Iterable[Round]) -> list[float]:
    """Mean seconds between two tokens, round by round."""
    return [statistics.fmean(r["itl_s"]) for r in rounds]


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
    pairs = [(OURS, peer, resident) for peer in (*PEERS, REFERENCE)]
    pairs += [(OURS_DISK, peer, disk) for peer in (PEER_DISK, PEER_DISK_EQUAL, PEER_DISK_WARM)]
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
        "resident_decode_s": shape.active_bytes / ceilings["memory_bytes_per_s"],
    }
    if OURS_DISK in disk:
        rate = max(ceilings["disk_bytes_per_s"].values())
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


def _check(name: str, passed: bool | None, detail: str) -> dict[str, Any]:
    """``passed`` None: could not be checked, which is not a pass."""
    return {"name": name, "passed": passed, "detail": detail}


def token_checks(rounds: Rounds, token_ids: list[int]) -> list[dict[str, Any]]:
    """Ours choose the same tokens in every round; a peer, fed with them, would choose nearly the same."""
    checks = []
    for name, played in rounds.items():
        agree = min(sum(a == b for a, b in zip(r["token_ids"], token_ids, strict=True)) for r in played)
        needed = len(token_ids) if name.startswith("duoserve") else PEER_AGREEMENT * len(token_ids)
        checks.append(_check(f"tokens of {name}", agree >= needed, f"{agree} of {len(token_ids)} as chosen"))
    return checks


def logit_checks(rounds: Rounds, scratch: Path) -> list[dict[str, Any]]:
    """Ours against float32 beside transformers' own bf16 error, and ours bitwise among themselves."""
    ours = [name for name in rounds if name.startswith("duoserve")]
    checks = []
    if OURS in ours and logits_file(scratch, REFERENCE).exists():
        reference_TV = torch.load(logits_file(scratch, REFERENCE))
        yardsticks = [_errors(torch.load(logits_file(scratch, peer)), reference_TV) for peer in PEERS]
        limit = LOGIT_ERROR_ALLOWANCE * max(error["p90"] for error in yardsticks)
        found = _errors(torch.load(logits_file(scratch, OURS)), reference_TV)
        detail = (
            f"relative error of the logits against float32, 90 % of the tokens below {found['p90']:.2e} "
            f"(limit {limit:.2e}, {LOGIT_ERROR_ALLOWANCE}x transformers' own in bf16); "
            f"of all {found['all']:.2e} (transformers {max(e['all'] for e in yardsticks):.2e})"
        )
        checks.append(_check("logits equal transformers'", found["p90"] <= limit, detail))
    for name in ours[1:]:
        same = torch.equal(torch.load(logits_file(scratch, name)), torch.load(logits_file(scratch, ours[0])))
        checks.append(_check(f"logits of {name}", same, f"bitwise {'as' if same else 'NOT as'} {ours[0]}"))
    return checks


def _errors(logits_TV: Tensor, reference_TV: Tensor) -> dict[str, float]:
    """||d|| / ||reference||: the token at 90 %, and of all tokens together; NaN passes no comparison."""
    difference_TV = logits_TV - reference_TV
    per_token = difference_TV.norm(dim=-1) / reference_TV.norm(dim=-1)
    return {"p90": float(per_token.quantile(0.9)), "all": float(difference_TV.norm() / reference_TV.norm())}


def byte_checks(shape: Shape, disk: Rounds, on_a_disk: bool) -> list[dict[str, Any]]:
    """What was called cold came from the disk, what was called warm did not; nothing can be said of a RAM disk."""
    checks = []
    for name, played in disk.items():
        passed, detail = _reads(name, played, shape)
        checks.append(_check(f"reads of {name}", passed if on_a_disk else None, detail))
    return checks


def _reads(name: str, played: Sequence[Round], shape: Shape) -> tuple[bool, str]:
    if name.startswith("duoserve"):
        shares = [(r["prefill_read"] + r["decode_read"]) / r["stats"]["bytes_total"] for r in played]
        return min(shares) >= READ_SHARE, f"{min(shares):.1%} of the bytes that it counts came from the disk"
    layers = shape.layers - (shape.layers // 4 if name == PEER_DISK_EQUAL else 0)
    needed = layers * shape.top_k * shape.expert_bytes * (shape.new_tokens - 1)
    share = statistics.median(r["decode_read"] for r in played) / needed
    passed = share <= 0.01 if name == PEER_DISK_WARM else share >= 0.99
    return passed, f"read {share:.2f}x the offloaded experts of its tokens from the disk"


def clock_checks(rounds: Rounds) -> list[dict[str, Any]]:
    """The engine's own TTFT and ITLs against the clock outside, in the median round."""
    checks = []
    for name in (n for n in rounds if n.startswith("duoserve")):
        outside = statistics.median(r["ttft_s"] + sum(r["itl_s"]) for r in rounds[name])
        own = statistics.median(r["stats"]["ttft_s"] + sum(r["stats"]["itl_s"]) for r in rounds[name])
        allowed = max(OWN_CLOCK_SHARE * outside, OWN_CLOCK_S * len(rounds[name][0]["token_ids"]))
        detail = f"request of {own:.4g} s by its own clock, {outside:.4g} s by the one outside"
        checks.append(_check(f"clock of {name}", abs(own - outside) <= allowed, detail))
    return checks


def targets(shape: Shape, raw: dict[str, Any], bounds: dict[str, float]) -> list[Target]:
    """The promises of the CPU bench; what was not measured has no value."""
    resident, disk = raw["rounds"]["resident"], raw["rounds"]["disk"]
    return [
        _against_best("resident prefill / transformers' best", ttfts, resident),
        _against_best("resident decode / transformers' best", tpots, resident),
        _disk_decode(disk),
        _decode_bytes(shape, disk),
        _disk_ttft(resident, disk, bounds),
        _memory(shape, raw["footprint"]),
    ]


def _against_best(name: str, seconds: Any, resident: Rounds) -> Target:
    """Against the peer that is fastest in the median, by pairs of rounds."""
    peers = [peer for peer in PEERS if peer in resident]
    if OURS not in resident or not peers:
        return Target(name, None, 1.0, at_least=True, unit="x")
    best = min(peers, key=lambda peer: statistics.median(seconds(resident[peer])))
    ratio = Summary.of_pairs(seconds(resident[best]), seconds(resident[OURS]))
    return Target(name, ratio.median, 1.0, at_least=True, unit="x", detail=f"{_spread(ratio)} against {best}")


def _disk_decode(disk: Rounds) -> Target:
    name = "decode from a cold disk / accelerate's"
    if OURS_DISK not in disk or PEER_DISK not in disk:
        return Target(name, None, 5.0, at_least=True, unit="x")
    ratio = Summary.of_pairs(tpots(disk[PEER_DISK]), tpots(disk[OURS_DISK]))
    equal = Summary.of_pairs(tpots(disk[PEER_DISK_EQUAL]), tpots(disk[OURS_DISK]))
    detail = f"{_spread(ratio)}; {equal.median:.3g}x when accelerate keeps a quarter of the layers' experts in RAM"
    return Target(name, ratio.median, 5.0, at_least=True, unit="x", detail=detail)


def _decode_bytes(shape: Shape, disk: Rounds) -> Target:
    """The largest round counts, and to the byte."""
    name = "bytes read in decode / misses x slot bytes"
    if OURS_DISK not in disk:
        return Target(name, None, 1.0, at_least=False, unit="x")
    shares, text = [], ""
    for played in disk[OURS_DISK]:
        moved = played["stats"]["bytes_total"] - played["prefill_stats"]["bytes_total"]
        needed = played["stats"]["misses_decode"] * shape.slot_bytes
        shares.append(moved / needed if needed else float(moved > 0))
        text = f"{moved} of {needed} bytes in the last round"
    return Target(name, max(shares), 1.0, at_least=False, unit="x", detail=text)


def _disk_ttft(resident: Rounds, disk: Rounds, bounds: dict[str, float]) -> Target:
    """By pairs of rounds, as the resident run of the same circle is the compute bound."""
    name = "TTFT from a cold disk / max(I/O bound, compute bound)"
    if OURS_DISK not in disk:
        return Target(name, None, 1.25, at_least=False, unit="x")
    io_s, compute_s = bounds["disk_prefill_io_s"], bounds["disk_prefill_compute_s"]
    larger = [max(io_s, seconds) for seconds in ttfts(resident[OURS])]
    ratio = Summary.of_pairs(ttfts(disk[OURS_DISK]), larger)
    detail = f"{_spread(ratio)}; I/O {io_s:.3g} s, compute {compute_s:.3g} s"
    return Target(name, ratio.median, 1.25, at_least=False, unit="x", detail=detail)


def _memory(shape: Shape, footprint: dict[str, int] | None) -> Target:
    name = "peak memory growth - (slots + dense weights + KV)"
    if footprint is None:
        return Target(name, None, MEMORY_ALLOWANCE_MB, at_least=False, unit=" MB")
    slots, dense, kv = shape.quarter * shape.slot_bytes, shape.dense_bytes, shape.kv_bytes
    beyond = (footprint["peak"] - slots - dense - kv) / 1e6
    detail = f"{footprint['peak'] / 1e6:.0f} MB - ({slots / 1e6:.0f} + {dense / 1e6:.0f} + {kv / 1e6:.1f}) MB"
    detail += f"; {footprint['anonymous'] / 1e6:.0f} MB of anonymous memory in the end"
    return Target(name, beyond, MEMORY_ALLOWANCE_MB, at_least=False, unit=" MB", detail=detail)


def _spread(ratio: Summary) -> str:
    return f"{ratio.low:.3g}-{ratio.high:.3g}x over the rounds"
