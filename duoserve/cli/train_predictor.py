"""``duoserve train-predictor``: trains a predictor of the experts that come next, on a trace."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

from duoserve.cli.options import Subparsers, add_parser, natural, refuse_to_replace, refuse_unused
from duoserve.errors import RequestError
from duoserve.predictors.files import check_place, notes_path, save_predictor
from duoserve.predictors.quality import measure
from duoserve.predictors.training import KINDS, train
from duoserve.traces.trace_file import open_trace

EXAMPLES = """\
  duoserve train-predictor bard-trace.safetensors --out predictor.safetensors
  duoserve train-predictor t.safetensors --kind duoserve --horizon 3 --out predictor.safetensors
  duoserve train-predictor t.safetensors --kind paper --out paper.safetensors --json
"""
MOST_MEASURED = 40


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "train-predictor", "train a predictor of the experts that come next", EXAMPLES)
    parser.add_argument("trace", type=Path, metavar="TRACE", help="what duoserve trace has recorded")
    parser.add_argument("--kind", choices=list(KINDS), default="duoserve", help="kind of predictor (default: duoserve)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="NAME.safetensors; NAME.json comes too")
    parser.add_argument(
        "--horizon", type=int, choices=[1, 2, 3], help="layers that the kind duoserve looks ahead (default: 1)"
    )
    parser.add_argument(
        "--seed",
        type=natural,
        metavar="S",
        default=0,
        help="seed that picks the held-out requests and begins the training (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Trains a predictor, measures it on the requests that were held out, and saves it."""
    if args.out.suffix != ".safetensors":
        raise RequestError(f"--out {args.out}: must be named .safetensors; the JSON beside it is named after it")
    for written in (args.out, notes_path(args.out)):
        refuse_to_replace(args.trace, "--out", written)
    check_place(args.out)
    if args.kind != "duoserve":
        refuse_unused(args, ["horizon"], f"the kind {args.kind!r} takes none, only duoserve does")
    trace, start = open_trace(args.trace), perf_counter()
    trace.check_decodes()
    bars = sys.stderr.isatty()
    predictor, held_out = train(trace, args.kind, horizon=args.horizon or 1, seed=args.seed, progress=bars)
    seconds = perf_counter() - start
    measured = [number for number in held_out if trace.decodes_R[number]][:MOST_MEASURED]
    quality = measure(predictor, trace, measured)
    data = {"trace": args.trace.name, "requests": len(trace), "tokens": trace.num_tokens, "held_out_requests": held_out}
    notes = {"data": data, "seed": args.seed, "train_seconds": round(seconds, 1), "held_out": quality.to_dict()}
    save_predictor(predictor, args.out, notes)
    if args.json:
        print(json.dumps({"kind": args.kind} | notes))
    else:
        top_k = trace.meta.top_k
        print(f"{args.out}: {args.kind}, trained in {seconds:.0f} s")
        print(
            f"on {len(measured)} requests held out: recall@{top_k} {quality.recall(top_k):.1%}, "
            f"exact {quality.exact():.1%}, at least half {quality.at_least_half():.1%}"
        )
