"""The planner against the machine that this runs on: ``python bench/plan_here.py MODEL...``, on an idle machine.

The machine is measured, as ``duoserve plan --measure`` does, then each model is run from disk and from RAM, with every
policy and number of slots below, and a table says how far off TTFT and TPOT were.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import product

from tables import markdown

from duoserve import MoEModel
from duoserve.config import Phase
from duoserve.planning.model_cards import find_model
from duoserve.planning.planner import Planner
from duoserve.planning.policy_speed import Question, Speed
from duoserve.planning.this_machine import this_machine
from duoserve.scheduling.hardware import GIB, Hardware

SLOTS, POLICIES, HOST = ("25%", "50%", "75%"), ("lru", "duoserve", "on-demand"), (0, GIB)
PROMPT, NEW_TOKENS, CONTEXT, ROUNDS = 128, 32, 512, 3
HEADING = [
    "model",
    "slots",
    "policy",
    "from",
    "TTFT s",
    "planned",
    "error",
    "TPOT ms",
    "planned",
    "error",
    "hits",
    "card",
]


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders, or bard and bard-fine")
    args = parser.parse_args()
    print(markdown([HEADING, *rows(args.models, this_machine(anew=True))]))


def rows(models: list[str], hardware: Hardware) -> Iterator[list[str]]:
    """A line for each way to run each model."""
    for model, slots, policy, host in product(models, SLOTS, POLICIES, HOST):
        question = Question(
            prompt=PROMPT, new_tokens=NEW_TOKENS, expert_slots=slots, host_memory=host, max_context=CONTEXT
        )
        planned = Planner(model, find_model(model)).plan(hardware, question).speeds[policy]
        yield [model, slots, policy, "RAM" if host else "disk", *figures(measured(model, slots, policy, host), planned)]


def measured(model: str, slots: str, policy: str, host: int) -> tuple[float, float, float]:
    """Median TTFT and TPOT in seconds, and the share of hits in decode, behind a round that fills the slots."""
    prompt = [(17 * at * at + 5 * at) % 250 + 2 for at in range(PROMPT)]
    taken = []
    with MoEModel.from_pretrained(
        model, device="cpu", expert_slots=slots, policy=policy, host_memory=host, max_context=CONTEXT
    ) as running:
        for _ in range(ROUNDS + 1):
            running.generate(prompt, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
            stats = running.stats
            taken.append((stats.ttft_s or 0.0, stats.tpot_s or 0.0, stats.hit_rate(Phase.DECODE) or 0.0))
    ttft_s, tpot_s, hits = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    return ttft_s, tpot_s, hits


def figures(found: tuple[float, float, float], planned: Speed) -> list[str]:
    """The cells behind a row's name."""
    ttft_s, tpot_s, hits = found
    return [
        *(f"{ttft_s:.3f}", f"{planned.ttft.total:.3f}", f"{planned.ttft.total / ttft_s - 1:+.0%}"),
        *(f"{1e3 * tpot_s:.2f}", f"{1e3 * planned.tpot.total:.2f}", f"{planned.tpot.total / tpot_s - 1:+.0%}"),
        *(f"{hits:.0%}", f"{planned.hit_rate:.0%}"),
    ]


if __name__ == "__main__":
    main()
