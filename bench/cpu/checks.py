"""The correctness of what the CPU bench timed, from the same run: tokens, logits, bytes and clocks.

T tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpu.rows import (
    BF12,
    BF12_EQUAL,
    BF12_POLICY,
    COMPILED,
    LLAMA_DISK,
    LLAMA_Q4,
    LLAMA_Q8,
    LLAMAS,
    OURS,
    OURS_POLICY,
    OURS_QUANTIZED,
    OWN_TOKENS,
    PEER_DISK_EQUAL,
    PEER_DISK_WARM,
    PEERS,
    REFERENCE,
    Rounds,
    logits_file,
)
from harness import Round
from shapes import Shape

# Beside transformers' own bf16 error against float32: two correct engines differ by rounding, and rounding moves a near
# tie of the router now and then, so the bulk of the tokens is judged and the mean is only shown.
LOGIT_ERROR_ALLOWANCE = 1.25
# How far rounding moves weights, about: int8 and q8_0 0.5 to 0.7 %, int4 near 10 %. q4_0 rounds the dense matrices too:
# the logits of transformers, with weights rounded so, are off by 16.5 %.
WEIGHT_ERRORS = {OURS_QUANTIZED["int8"]: 0.01, OURS_QUANTIZED["int4"]: 0.1, LLAMA_Q8: 0.01, LLAMA_Q4: 0.17}
# A peer's argmax may differ where two logits all but tie; one that computes something else hardly ever agrees.
PEER_AGREEMENT = 0.75
# A policy that prefetches for the next token leaves some reads of one request to be counted in the next.
READ_SHARE = 0.95
OWN_CLOCK_SHARE, OWN_CLOCK_S = 0.05, 1e-3  # of the time outside, and per token: text and bookkeeping are outside only


def _check(name: str, passed: bool | None, detail: str) -> dict[str, Any]:
    """``passed`` None: could not be checked, which is not a pass."""
    return {"name": name, "passed": passed, "detail": detail}


def token_checks(rounds: Rounds, token_ids: list[int]) -> list[dict[str, Any]]:
    """Ours choose the same tokens in every round; a peer, fed with them, would choose nearly the same.

    What has other weights, or sums in another order, may choose otherwise, but in every round alike, and from disk as
    from RAM; llama.cpp, which cannot be fed in a round, is checked by its logits.
    """
    checks = []
    for name, played in rounds.items():
        if name in LLAMAS:
            continue
        leader = OWN_TOKENS.get(name)
        expected = token_ids if leader is None else rounds[leader][0]["token_ids"]
        agree = min(sum(a == b for a, b in zip(r["token_ids"], expected, strict=True)) for r in played)
        needed = len(expected) if name.startswith("duoserve") else PEER_AGREEMENT * len(expected)
        whose = "as chosen" if leader is None else f"as in the first round of {leader}"
        checks.append(_check(f"tokens of {name}", agree >= needed, f"{agree} of {len(expected)} {whose}"))
    return checks


def logit_checks(rounds: Rounds, scratch: Path) -> list[dict[str, Any]]:
    """Ours and llama.cpp's against float32, beside transformers' own bf16 error; ours bitwise as from RAM.

    Compiled prompts have bits of their own, and so may BF12 experts, which are computed a block of rows at a time.
    """
    checks = []
    if logits_file(scratch, REFERENCE).exists():
        judged = [name for name in (OURS, COMPILED, BF12, *OURS_QUANTIZED.values(), *LLAMAS) if name in rounds]
        checks += [_logit_check(name, scratch) for name in judged]
    leaders = {OURS_POLICY: COMPILED, BF12_POLICY: BF12, BF12_EQUAL: BF12}
    in_ram = {OURS, COMPILED, BF12, *OURS_QUANTIZED.values()}
    for name in (name for name in rounds if name.startswith("duoserve") and name not in in_ram):
        leader = leaders.get(name, OURS)
        same = torch.equal(torch.load(logits_file(scratch, name)), torch.load(logits_file(scratch, leader)))
        checks.append(_check(f"logits of {name}", same, f"bitwise {'as' if same else 'NOT as'} {leader}"))
    return checks


def _logit_check(name: str, scratch: Path) -> dict[str, Any]:
    """llama.cpp leaves the last tokens only, as log-probabilities: logits but for a constant of each token."""
    logits_TV, reference_TV = (torch.load(logits_file(scratch, which)) for which in (name, REFERENCE))
    files = [logits_file(scratch, peer) for peer in PEERS]
    peers_TV = [torch.load(file) for file in files if file.exists()]
    last = len(logits_TV)
    yardsticks = [_errors(peer_TV[-last:], reference_TV[-last:]) for peer_TV in peers_TV]
    rounding = WEIGHT_ERRORS.get(name, 0.0)
    limit = LOGIT_ERROR_ALLOWANCE * (max(error["p90"] for error in yardsticks) + rounding)
    found = _errors(logits_TV, reference_TV[-last:])
    also = f" and {rounding:.0%} for rounded weights" if rounding else ""
    detail = (
        f"relative error of the logits against float32, 90 % of the tokens below {found['p90']:.2e} "
        f"(limit {limit:.2e}, {LOGIT_ERROR_ALLOWANCE}x transformers' own in bf16{also}); "
        f"of all {found['all']:.2e} (transformers {max(e['all'] for e in yardsticks):.2e})"
    )
    which = "logits equal transformers'" if name == OURS else f"logits of {name} equal transformers'"
    return _check(which, found["p90"] <= limit, detail)


def _errors(logits_TV: Tensor, reference_TV: Tensor) -> dict[str, float]:
    """||d|| / ||reference||, means taken out: the token at 90 %, and of all tokens; NaN passes no comparison."""
    logits_TV, reference_TV = (x_TV - x_TV.mean(dim=-1, keepdim=True) for x_TV in (logits_TV, reference_TV))
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
    least = 0.99
    if name == LLAMA_DISK:  # its limit may hold a part, or all of a tiny model
        least = max(0.0, 1 - shape.cap_bytes / (shape.num_experts * shape.expert_bytes))
    passed = share <= 0.01 if name == PEER_DISK_WARM else share >= least
    return passed, f"read {share:.2f}x the experts of its tokens that are not in RAM from the disk"


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
