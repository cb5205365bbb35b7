"""What policies come to in replay: caches, prefetch by the precision of what it goes by, and the paper's claim.

``python bench/bench_policies.py --out bench/results/policies.md``. No model and no GPU: traces are made up
(duoserve/scheduling/synthetic.py), the clock is virtual, the scheduler is the real one.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tables import markdown

from duoserve.predictors.training import train
from duoserve.scheduling.bake_off import bake_off
from duoserve.scheduling.cache_study import belady_hits, cached_hits
from duoserve.scheduling.hardware import LINKS, Machine, find_hardware, find_sizes
from duoserve.scheduling.policies import EVICTIONS, get_policy
from duoserve.scheduling.replay import Replay, replay
from duoserve.scheduling.selection import select
from duoserve.scheduling.synthetic import CARDS, synthesize

Row = list[str]
PRECISIONS = (0.35, 0.6, 0.8, 0.95)
# Of arXiv 2509.07379: the most that it gains over each baseline, over all its models, devices and data.
PUBLISHED_TTFT, PUBLISHED_E2E = 5.34, 7.55
# Models, the routing they are replayed with, and the share of the experts in slots: the paper's 15 % of the model.
CLAIMED = (
    ("mixtral-8x7b", "mixtral-8x7b", 32, "a5000"),
    ("mixtral-8x22b", "mixtral-8x7b", 56, "a6000"),
    ("qwen3-30b-a3b", "qwen3-30b-a3b", 48, "a5000"),
)
PAPER_SHARE, PAPER_PRECISION = 0.15, 0.8


def hit_rates() -> Iterator[Row]:
    """Decode hits of every eviction on Qwen3-30B's routing, one request of warm-up."""
    yield ["eviction", "12.5 %", "25 %", "50 %"]
    card = dataclasses.replace(CARDS["qwen3-30b-a3b"], num_layers=8)
    trace = synthesize(card, requests=7, tokens=192, precision=0.8, seed=1, prompt=64)
    slots = [int(share * card.num_experts) for share in (0.125, 0.25, 0.5)]
    for name, eviction in EVICTIONS.items():
        yield [name, *(f"{100 * cached_hits(trace, count, eviction.ranking, 1).rate:.1f}" for count in slots)]
    yield ["Belady with bypass", *(f"{100 * belady_hits(trace, count, 1).rate:.1f}" for count in slots)]


def prefetch_by_precision() -> Iterator[Row]:
    """Qwen3-30B FP8 on an RTX 4090 with a quarter of its experts in slots; look-ahead scores of every precision."""
    yield ["precision", "lru", "duoserve, no guesses", "lookahead", "duoserve", "oracle", "wasted", "TPOT gain"]
    machine = Machine(find_hardware("rtx4090"), find_sizes("qwen3-30b-a3b"))
    for precision in PRECISIONS:
        trace = synthesize(CARDS["qwen3-30b-a3b"], 4, 64, precision, seed=3, prompt=64)
        slots = int(0.25 * 128 * 48)
        predictor, _ = train(select(trace, [2, 3]), "lookahead")
        held = select(trace, [0, 1])
        names = ["lru", "lookahead", "duoserve", "oracle"]
        runs = bake_off(held, machine, [slots], names, {"lookahead": predictor, "duoserve": predictor})
        lru, lookahead, ours, oracle = runs
        quiet = replay(held, get_policy("duoserve").without_guesses(), machine, slots)
        tpots = [f"{1e3 * (run.tpot_s or 0):.2f}" for run in (lru, quiet, lookahead, ours, oracle)]
        wasted = ours.bytes.wasted / max(1, ours.bytes.total)
        yield [f"{precision:.2f}", *tpots, f"{wasted:.1%}", f"{(quiet.tpot_s or 0) / (ours.tpot_s or 1):.3f}x"]


def papers_claim() -> Iterator[Row]:
    """End-to-end time and TTFT over those of duoserve-paper; duoserve at equal memory in the last column."""
    baselines = ["on-demand", "layer-prefetch", "activation-matrix"]
    yield ["model, device", *(f"{name} {what}" for name in baselines for what in ("TTFT", "E2E")), "paper / duoserve"]
    for model, routing, layers, device in CLAIMED:
        card = dataclasses.replace(CARDS[routing], num_layers=layers)
        trace = synthesize(card, 4, 64, PAPER_PRECISION, seed=5, prompt=128)
        held, rest = select(trace, [0, 1]), select(trace, [2, 3])
        told, _ = train(rest, "lookahead")
        matrices, _ = train(rest, "activation-matrix")
        # The paper's network would take very long to train on such a trace: look-ahead of its accuracy stands in.
        predictors = {"paper": told, "duoserve": told, "activation-matrix": matrices}
        slots = int(PAPER_SHARE * card.num_experts * layers)
        machine = Machine(find_hardware(device), find_sizes(model))
        runs = {
            run.policy: run
            for run in bake_off(held, machine, [slots], [*baselines, "duoserve-paper", "duoserve"], predictors)
        }
        paper = runs["duoserve-paper"]
        ratios = [f"{ratio:.2f}" for name in baselines for ratio in _over(runs[name], paper)]
        yield [f"{model}, {device}", *ratios, f"{paper.e2e_s / runs['duoserve'].e2e_s:.2f}"]


def long_prompts() -> Iterator[Row]:
    """Qwen3-30B FP8 on an A5000 with a link of 50 GB/s: 8192 tokens through few slots, then 32 new ones."""
    yield ["slots", "TTFT of the first prompt, s", "TTFT of later ones, s", "/ bound", "TPOT, ms", "decode hits"]
    trace = synthesize(CARDS["qwen3-30b-a3b"], 3, 33, 0.8, seed=1, prompt=8192)
    machine = Machine(dataclasses.replace(find_hardware("a5000"), link=LINKS["pcie5x16"]), find_sizes("qwen3-30b-a3b"))
    resident = replay(trace, get_policy("resident"), machine, 128 * 48)
    for share in (0.01, 0.02, 0.05, 0.125):
        run = replay(trace, get_policy("lru"), machine, int(share * 128 * 48))
        later_s = float(np.mean(run.ttft_s[1:]))
        link_s = (128 * 48 - run.num_slots) * machine.hardware.copy_s(machine.sizes.expert_bytes)
        bound_s = max(link_s, resident.ttft_s[-1])
        row = [f"{share:.1%}", f"{run.ttft_s[0]:.3f}", f"{later_s:.3f}", f"{later_s / bound_s:.2f}x"]
        yield [*row, f"{1e3 * (run.tpot_s or 0):.2f}", f"{run.hit_rate or 0:.1%}"]


def _over(run: Replay, paper: Replay) -> tuple[float, float]:
    return float(np.mean(run.ttft_s) / np.mean(paper.ttft_s)), run.e2e_s / paper.e2e_s


TABLES: dict[str, tuple[str, Callable[[], Iterator[Row]]]] = {
    "hits": ("Decode hit rates, %, Qwen3-30B routing, caches of each layer", hit_rates),
    "prompts": (
        "Prompts of 8192 tokens, Qwen3-30B FP8, A5000 at 50 GB/s, by the share of experts in slots",
        long_prompts,
    ),
    "precision": ("TPOT in ms, Qwen3-30B FP8, RTX 4090, 25 % of the experts in slots", prefetch_by_precision),
    "claim": (
        f"Time over duoserve-paper's (published: TTFT up to {PUBLISHED_TTFT}, end to end up to {PUBLISHED_E2E})",
        papers_claim,
    ),
}


def main() -> None:
    """Writes the tables that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--out", type=Path, help="append there too")
    args = parser.parse_args()
    for name in args.tables or list(TABLES):
        title, make = TABLES[name]
        begun = time.perf_counter()
        body = markdown(make())
        seconds = time.perf_counter() - begun
        note = (
            f"`python bench/bench_policies.py {name}`, {datetime.now(UTC):%Y-%m-%d}, {seconds:.0f} s. Made-up traces."
        )
        text = f"## {title}\n\n{note}\n\n{body}\n"
        print(text, flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
