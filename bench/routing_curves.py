"""Makes duoserve/assets/routing.json: what the planner knows of how models route.

``python bench/routing_curves.py``: some minutes. Traces are made up after the five cards of
duoserve/traces/synthetic.py; layers are alike, so a few of them are enough. The embedded models are traced while
they write, each request behind a line of a play that they have not seen. E experts, B sequences, K top-k.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from duoserve.config import EngineConfig, Phase
from duoserve.experts.hub import EMBEDDED
from duoserve.replaying.cache_study import Step, layer_hits, prompt_step
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import EVICTIONS
from duoserve.scheduling.ranking import Ranking
from duoserve.traces.synthetic import CARDS, RoutingCard, synthesize
from duoserve.traces.trace import Trace
from duoserve.tracing import RecordingSpec, record

OUT = Path(__file__).resolve().parents[1] / "duoserve" / "assets" / "routing.json"
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
BATCHES = (1, 4, 16)
RANKINGS: dict[str, Callable[[int, int], Ranking]] = {name: EVICTIONS[name].ranking for name in ("lru", "lfru")}
WINDOWS = tuple(1 << n for n in range(12))
ROWS = tuple(1 << n for n in range(7))
PROMPT, TOKENS, LAYERS, PRECISION = 64, 192, 4, 0.8  # the look-ahead scores that PRECISION is of are not used
SCENE = Path(__file__).resolve().parents[1] / "tests" / "macbeth.txt"
WRITTEN, WRITTEN_LONG, LONG = 16, 2, 1024  # requests of an embedded model, and tokens of the long ones


def main() -> None:
    """Writes the file anew."""
    found = {card.name: made_up_curves(card) for card in CARDS.values()} | {name: own_curves(name) for name in EMBEDDED}
    OUT.write_text(json.dumps(found, indent=1) + "\n")


def made_up_curves(card: RoutingCard) -> dict[str, Any]:
    """Of a card."""
    few = dataclasses.replace(card, num_layers=LAYERS)
    trace = synthesize(few, 4 * max(BATCHES), TOKENS, PRECISION, seed=11, prompt=PROMPT)
    return curves(trace, synthesize(few, 4, 1, PRECISION, seed=12, prompt=max(WINDOWS)))


def own_curves(name: str) -> dict[str, Any]:
    """Of an embedded model."""
    lines = [line for line in SCENE.read_text().splitlines() if len(line) > 30]
    few, long = lines[:WRITTEN], lines[WRITTEN : WRITTEN + WRITTEN_LONG]
    with tempfile.TemporaryDirectory() as folder:
        return curves(
            written(name, few, PROMPT + TOKENS, Path(folder, "few")), written(name, long, LONG, Path(folder, "long"))
        )


def written(name: str, lines: list[str], tokens: int, out: Path) -> Trace:
    """The routing of what the model makes of each of ``lines``, each of at least so many ``tokens``."""
    params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=0, ignore_eos=True)
    return record(name, lines, RecordingSpec(out, params), EngineConfig(), "resident", progress=True)


def curves(trace: Trace, long: Trace) -> dict[str, Any]:
    """Hit rates by eviction and batch over the share of a layer's experts in slots; distinct experts of tokens.

    Prompts are windows of ``long``; batches are as large as there are requests, twice as many for the hits.
    """
    num_experts = trace.meta.num_experts
    batches = [batch for batch in BATCHES if 2 * batch <= len(trace)]
    widths = [width for width in WINDOWS if width <= len(long[0].token_ids_T)]
    return {
        "num_experts": num_experts,
        "top_k": trace.meta.top_k,
        "shares": [count / num_experts for count in slot_counts(num_experts)],
        "hits": {name: {batch: hit_rates(trace, batch, make) for batch in batches} for name, make in RANKINGS.items()},
        "window": {width: round(distinct_in_windows(long, width, max(widths)), 3) for width in widths},
        "batch": {rows: round(distinct_in_batches(trace, rows), 3) for rows in ROWS if rows <= len(trace)},
    }


def slot_counts(num_experts: int) -> list[int]:
    """A layer's slots at each of SHARES, rounded up."""
    return sorted({math.ceil(share * num_experts) for share in SHARES})


def hit_rates(trace: Trace, batch: int, make: Callable[[int, int], Ranking]) -> list[float]:
    """By share of the experts in slots; the first group of ``batch`` requests fills the slots and is not counted."""
    num_experts = trace.meta.num_experts
    found = []
    for num_slots in slot_counts(num_experts):
        uses = hits = 0
        for layer in trace.meta.layers:
            courses = list(groups(trace, layer, batch))
            counted = layer_hits(courses, num_slots, make(1, num_experts), 1)
            uses, hits = uses + counted.uses, hits + counted.hits
        found.append(round(hits / uses, 4))
    return found


def groups(trace: Trace, layer: int, batch: int) -> Iterator[list[Step]]:
    """Requests that are served ``batch`` at a time: their prompts, then steps of a token of each; at most 8 groups."""
    for first in range(0, min(len(trace), 8 * batch), batch):
        ids_BNK = [trace[first + row].layers[layer].topk_ids_NK for row in range(batch)]
        steps = [prompt_step(ids_NK[:PROMPT]) for ids_NK in ids_BNK]
        decoded = np.stack([ids_NK[PROMPT : PROMPT + TOKENS] for ids_NK in ids_BNK], axis=1)
        yield steps + [prompt_step(ids_BK)._replace(phase=Phase.DECODE) for ids_BK in decoded]


def distinct_in_windows(trace: Trace, width: int, tokens: int) -> float:
    """Experts that ``width`` consecutive ones of the first ``tokens`` tokens use, on average over the layers."""
    counts = [
        len(np.unique(request.layers[layer].topk_ids_NK[start : start + width]))
        for request in trace
        for layer in trace.meta.layers
        for start in range(0, tokens, max(width, 64))
    ]
    return float(np.mean(counts))


def distinct_in_batches(trace: Trace, rows: int) -> float:
    """Experts that a token each of ``rows`` requests uses, on average over the layers."""
    counts = []
    for layer in trace.meta.layers:
        ids_RNK = np.stack([request.layers[layer].topk_ids_NK[: PROMPT + TOKENS] for request in trace])
        counts += [len(np.unique(ids_RNK[:rows, at])) for at in range(PROMPT, PROMPT + TOKENS, 8)]
    return float(np.mean(counts))


if __name__ == "__main__":
    main()
