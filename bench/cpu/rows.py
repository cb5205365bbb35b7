"""The rows of the CPU bench by name, and what is read off their rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from harness import Round

Rounds = dict[str, list[Round]]
OURS, OURS_DISK = "duoserve resident", "duoserve lru"
COMPILED, OURS_POLICY = "duoserve resident, compiled", "duoserve duoserve, compiled"
# The same with experts in BF12, which are those of bfloat16 bit by bit: a quarter of them in slots, or as many as take
# the memory of a quarter in bfloat16.
BF12, BF12_POLICY, BF12_EQUAL = "duoserve resident, bf12", "duoserve duoserve, bf12", "duoserve duoserve, bf12 +"
POLICIES = (OURS_POLICY, BF12_POLICY, BF12_EQUAL)
OURS_QUANTIZED = {"int8": "duoserve resident int8", "int4": "duoserve resident int4"}
PEERS = ("transformers grouped_mm", "transformers eager")
PEER_DISK, PEER_DISK_WARM = "accelerate cold", "accelerate warm"
PEER_DISK_EQUAL = "accelerate cold, a quarter in RAM"
LLAMA, LLAMA_DISK = "llama.cpp bf16", "llama.cpp bf16, mapped"
LLAMA_Q8, LLAMA_Q4 = "llama.cpp q8_0", "llama.cpp q4_0"
LLAMAS = (LLAMA, LLAMA_Q8, LLAMA_Q4, LLAMA_DISK)
REFERENCE = "transformers float32"
ON_DEMAND, LAYER_PREFETCH = "duoserve on-demand", "duoserve layer-prefetch"
OP_BY_OP = (OURS, OURS_DISK, ON_DEMAND, LAYER_PREFETCH)  # of duoserve's rows; the others are compiled
# What a quick run leaves out, for it checks the bench: each is set up as another but for a number, a name or a format.
QUICK_WITHOUT = frozenset(
    {OURS_QUANTIZED["int4"], LLAMA_Q4, BF12, BF12_POLICY, BF12_EQUAL}
    | {PEERS[1], PEER_DISK_EQUAL, PEER_DISK_WARM, LAYER_PREFETCH}
)
# Compiled decode steps make their sums in another order, and quantized experts are others: by engine, whose first round
# has the tokens that it must choose.
OWN_TOKENS = dict.fromkeys((COMPILED, BF12, *POLICIES), COMPILED) | {name: name for name in OURS_QUANTIZED.values()}


def logits_file(scratch: Path, name: str) -> Path:
    """Where the logits of a contestant wait for the comparison."""
    return scratch / f"{name.replace(' ', '-')}.pt"


def ttfts(rounds: Iterable[Round]) -> list[float]:
    """Seconds to the first token, round by round."""
    return [r["ttft_s"] for r in rounds]


def tpots(rounds: Iterable[Round]) -> list[float]:
    """Mean seconds between two tokens, round by round."""
    return [statistics.fmean(r["itl_s"]) for r in rounds]


def decode_io(policy: str) -> str:
    """The name of the bound that the disk sets to the decode steps of one of POLICIES."""
    return f"decode_io_s of {policy}"


def decode_bytes(played: Round) -> int:
    """Bytes that our engine counts as moved by the decode steps of a round, in time, late, or for nothing."""
    moved: int = played["stats"]["bytes_total"] - played["prefill_stats"]["bytes_total"]
    return moved
