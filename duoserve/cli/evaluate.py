"""``duoserve evaluate``: trace, train, replay, recommend; ``policy="auto"`` then does what was found best."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from duoserve.cli.hardware_option import add_hardware, replayed_on
from duoserve.cli.options import MODEL_HELP, Subparsers, add_parser, natural, refuse_unused
from duoserve.cli.prompts import read_prompts
from duoserve.cli.replay_report import slot_counts, table
from duoserve.cli.sampling_options import folder_with_text
from duoserve.config import EngineConfig
from duoserve.errors import RequestError
from duoserve.evaluating import Evaluation, evaluate
from duoserve.experts.checkpoint import Checkpoint
from duoserve.loading.recommendation import check_place, save_recommendation
from duoserve.models.opened import opened
from duoserve.planning.sizes import layer_sizes
from duoserve.replaying.hardware import Machine
from duoserve.sampling import SamplingParams
from duoserve.scheduling.plan import ModelShape
from duoserve.traces.trace import Trace
from duoserve.traces.trace_file import open_trace
from duoserve.tracing import RecordingSpec, record

MAX_TOKENS = 64
EXAMPLES = """\
  duoserve evaluate bard --prompts prompts.txt --hardware this
  duoserve evaluate ./my-mixtral --trace t.safetensors --slots 12.5%,25%
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "evaluate", "find the policy and predictor that serve a model best", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="what duoserve trace has recorded of the model")
    recorded = "record a trace of these prompts first: one a line, which in a file named .jsonl is a JSON text"
    source.add_argument("--prompts", type=Path, metavar="FILE", help=recorded)
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"tokens to write for each prompt (default: {MAX_TOKENS})"
    )
    add_hardware(parser)
    parser.add_argument(
        "--slots",
        default="25%",
        metavar="N,...",
        help="slots over all layers: counts, or shares of all experts (default: 25%%)",
    )
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="S",
        help="seed that picks the held-out requests and begins the training (default: 0)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what is best and write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Prints a row for each policy that evaluating.py compares, what to expect, and where that was written.

    The policies are BASELINES, GUESSING (the best of them without guesses too) and the oracle. What cannot be done is
    refused before the prompts are run, which takes the longest.
    """
    prompts = [] if args.prompts is None else _prompts(args)
    with opened(args.model) as found, ExitStack() as resources:
        trace = None if args.trace is None else _given_trace(args, found.checkpoint)
        slots = slot_counts(args.slots, ModelShape.of(found.config))
        if not args.dry_run:
            check_place(found.checkpoint)
        machine = Machine(replayed_on(args.hardware), layer_sizes(found))
        if trace is None:
            trace = _recorded(args, prompts, Path(resources.enter_context(tempfile.TemporaryDirectory())))
        done = evaluate(trace, machine, slots, args.seed, progress=sys.stderr.isatty())
        context, where = {"hardware": machine.hardware.name, "rows": done.rows}, None
        try:
            if not args.dry_run:
                where = save_recommendation(found.checkpoint, done.recommendation, done.predictor, context)
        finally:  # also if the disk is full by now: finding the result has taken long
            _say(done, context, where, as_json=args.json)


def _say(done: Evaluation, context: Mapping[str, Any], where: Path | None, *, as_json: bool) -> None:
    best = done.recommendation
    if as_json:
        about = {"policy": best.policy, "predictor": best.use_predictor, "why": best.why}
        print(json.dumps({**about, **context, "folder": where and str(where)}))
    else:
        print("\n".join([*table(done.rows), "", best.why]))
        print("nothing was written" if where is None else f'written to {where}: policy="auto" now does this')


def _given_trace(args: argparse.Namespace, checkpoint: Checkpoint) -> Trace:
    refuse_unused(args, ["max_tokens"], "nothing is written where a --trace was recorded before: give --prompts")
    return open_trace(args.trace, checkpoint.fingerprint())


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts; raises RequestError if nothing could be learned from running them, or if they cannot be run."""
    if args.max_tokens is not None and args.max_tokens < 2:  # the first token comes from the prompt's own pass
        raise RequestError(f"--max-tokens {args.max_tokens}: no request would decode: give at least 2")
    prompts = read_prompts(args.prompts)
    if len(set(prompts)) < 2:
        raise RequestError(f"--prompts {args.prompts}: has one prompt, but some are held out: give at least 2")
    folder_with_text(args.model)
    return prompts


def _recorded(args: argparse.Namespace, prompts: Sequence[str], scratch: Path) -> Trace:
    max_tokens = MAX_TOKENS if args.max_tokens is None else args.max_tokens
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=args.seed)
    recording = RecordingSpec(scratch / "trace.safetensors", params)
    # Not by "auto": an earlier recommendation must not keep a new one from being made.
    return record(args.model, prompts, recording, EngineConfig(), "duoserve", progress=sys.stderr.isatty())
