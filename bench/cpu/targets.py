"""The promises of the CPU bench, each with its verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from cpu.rows import (
    BF12_EQUAL,
    BF12_POLICY,
    COMPILED,
    LLAMA,
    LLAMA_DISK,
    LLAMA_Q4,
    LLAMA_Q8,
    OURS,
    OURS_DISK,
    OURS_POLICY,
    OURS_QUANTIZED,
    PEER_DISK,
    PEER_DISK_EQUAL,
    PEERS,
    Rounds,
    decode_bytes,
    decode_io,
    tpots,
    ttfts,
)
from harness import Summary, Target
from shapes import Shape

MEMORY_ALLOWANCE_MB = 200.0


def targets(shape: Shape, raw: dict[str, Any], bounds: dict[str, float]) -> list[Target]:
    """All of them; what was not measured has no value."""
    resident, disk = raw["rounds"]["resident"], raw["rounds"]["disk"]
    int8, int4 = (OURS_QUANTIZED[format] for format in ("int8", "int4"))
    return [
        _ratio("resident prefill / transformers' best", 1.0, resident, COMPILED, PEERS, ttfts),
        _ratio("resident decode / transformers' best", 2.0, resident, COMPILED, PEERS, tpots),
        _ratio("resident prefill / llama.cpp's", 4.0, resident, COMPILED, [LLAMA], ttfts),
        _ratio("resident decode / llama.cpp's", 1.2, resident, COMPILED, [LLAMA], tpots),
        _ratio("int8 decode / llama.cpp's in q8_0", 1.0, resident, int8, [LLAMA_Q8], tpots),
        _ratio("int4 decode / llama.cpp's in q4_0", 1.0, resident, int4, [LLAMA_Q4], tpots),
        *_from_disk(shape, raw, bounds, BF12_POLICY, "a quarter of the experts"),
        *_from_disk(shape, raw, bounds, BF12_EQUAL, "bf12 in a quarter's memory"),
        *_from_disk(shape, raw, bounds, OURS_POLICY, "a quarter in bfloat16"),
        _decode_bytes(shape, disk),
        _disk_ttft(resident, disk, bounds),
        _memory(shape, raw["footprint"]),
    ]


def _from_disk(shape: Shape, raw: dict[str, Any], bounds: dict[str, float], policy: str, slots: str) -> list[Target]:
    """Those of our policy with so many ``slots``, of which Belady's cache gets as many experts."""
    disk = raw["rounds"]["disk"]
    return [
        _ratio(f"{slots}: decode / accelerate's, cold", 8.0, disk, policy, [PEER_DISK], tpots),
        _ratio(f"{slots}: decode / llama.cpp's, same limit", 8.0, disk, policy, [LLAMA_DISK], tpots),
        _decode_io(slots, disk, bounds, policy),
        _against_belady(slots, shape, disk, raw["least_misses"], policy),
    ]


def _ratio(  # noqa: PLR0913, PLR0917
    name: str, limit: float, played: Rounds, ours: str, peers: Sequence[str], seconds: Callable[..., list[float]]
) -> Target:
    """Speed against the peer that is fastest in the median, by pairs of rounds."""
    measured = [peer for peer in peers if peer in played]
    if ours not in played or not measured:
        return Target(name, None, limit, at_least=True, unit="x")
    best = min(measured, key=lambda peer: statistics.median(seconds(played[peer])))
    ratio = Summary.of_pairs(seconds(played[best]), seconds(played[ours]))
    detail = f"{ours}: {_spread(ratio)} against {best}"
    if best == PEER_DISK and PEER_DISK_EQUAL in played:
        equal = Summary.of_pairs(seconds(played[PEER_DISK_EQUAL]), seconds(played[ours]))
        detail += f"; {equal.median:.3g}x when accelerate keeps a quarter of the layers' experts in RAM"
    return Target(name, ratio.median, limit, at_least=True, unit="x", detail=detail)


def _decode_io(slots: str, disk: Rounds, bounds: dict[str, float], policy: str) -> Target:
    """The bound is of the bytes that the policy moved, whatever for, at the best rate that the disk was seen at."""
    name = f"{slots}: decode / I/O bound of the bytes read"
    if policy not in disk:
        return Target(name, None, 1.15, at_least=False, unit="x")
    bound = bounds[decode_io(policy)]
    ratio = Summary.of([seconds / bound for seconds in tpots(disk[policy])])
    detail = f"{policy}: {_spread(ratio)}; {bound * 1e3:.4g} ms"
    return Target(name, ratio.median, 1.15, at_least=False, unit="x", detail=detail)


def _against_belady(
    slots: str, shape: Shape, disk: Rounds, least: dict[str, dict[str, int]] | None, policy: str
) -> Target:
    """Against the same share of slots for each layer; the bound without shares is in the detail. The worst round."""
    name = f"{slots}: bytes read in decode / Belady's"
    if policy not in disk or least is None:
        return Target(name, None, 1.25, at_least=False, unit="x")
    moved = max(decode_bytes(played) for played in disk[policy])
    nbytes = shape.slot_bytes if policy == OURS_POLICY else shape.bf12_slot_bytes
    per_layer, pooled = (least[policy][which] * nbytes for which in ("per_layer", "pooled"))
    detail = f"{policy}: {moved / 1e6:.1f} of {per_layer / 1e6:.1f} MB; {moved / pooled:.3g}x of one pool's"
    if policy != OURS_POLICY:
        unpacked = least[OURS_POLICY]["per_layer"] * shape.slot_bytes
        detail += f"; {moved / unpacked:.3g}x of Belady's where a quarter is in slots in bfloat16"
    return Target(name, moved / per_layer, 1.25, at_least=False, unit="x", detail=detail)


def _decode_bytes(shape: Shape, disk: Rounds) -> Target:
    """The largest round counts, and to the byte."""
    name = "bytes read in decode / misses x slot bytes"
    if OURS_DISK not in disk:
        return Target(name, None, 1.0, at_least=False, unit="x")
    shares, text = [], ""
    for played in disk[OURS_DISK]:
        moved = decode_bytes(played)
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
