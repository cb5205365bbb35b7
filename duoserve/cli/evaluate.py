"""``duoserve evaluate``: trace, train, replay, choose; ``policy="auto"`` then does what was found best."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from duoserve.choice import save_choice
from duoserve.cli.machines import add_hardware, replayed_on
from duoserve.cli.options import MODEL_HELP, Subparsers, add_parser, natural, refuse_in_vain
from duoserve.cli.prompts import read_prompts
from duoserve.config import EngineConfig
from duoserve.errors import RequestError
from duoserve.evaluating import evaluate
from duoserve.models.opened import opened
from duoserve.planning.sizes import layer_sizes
from duoserve.sampling import SamplingParams
from duoserve.scheduling.bake_off import slot_count, table
from duoserve.scheduling.hardware import Machine
from duoserve.scheduling.trace import Trace
from duoserve.scheduling.trace_file import open_trace
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
    source.add_argument("--prompts", type=Path, metavar="FILE", help="record one first, of these prompts")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"for each prompt (default: {MAX_TOKENS})")
    add_hardware(parser)
    parser.add_argument(
        "--slots", default="25%", metavar="N,...", help="over all layers: counts, or shares (default: 25%%)"
    )
    parser.add_argument(
        "--seed", type=natural, default=0, metavar="S", help="of the held-out requests and the training"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what is best and write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Prints rows for the policies that evaluating.py compares, what to expect, and where the choice was written.

    These are its BASELINES, its KINDS (the best of them without guesses too) and the oracle, not every policy.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _evaluate(args, _trace(args, Path(scratch)))


def _evaluate(args: argparse.Namespace, trace: Trace) -> None:
    slots = [slot_count(wanted.strip(), trace) for wanted in args.slots.split(",")]
    with opened(args.model) as found:
        machine = Machine(replayed_on(args.hardware), layer_sizes(found))
        done = evaluate(trace, machine, slots, args.seed, progress=sys.stderr.isatty())
        context = {"hardware": machine.hardware.name, "rows": done.rows}
        where = None if args.dry_run else save_choice(found.checkpoint, done.choice, done.predictor, context)
    if args.json:
        chosen = {"policy": done.choice.policy, "predictor": done.choice.use_predictor, "why": done.choice.why}
        print(json.dumps(chosen | context | {"folder": where and str(where)}))
    else:
        print("\n".join([*table(done.rows), "", done.choice.why]))
        print("nothing was written" if where is None else f'written to {where}: policy="auto" now does this')


def _trace(args: argparse.Namespace, scratch: Path) -> Trace:
    with opened(args.model) as found:
        fingerprint = found.checkpoint.fingerprint()
    if args.trace is not None:
        refuse_in_vain(args, ["max_tokens"], "nothing is written where a --trace was recorded before: give --prompts")
        return open_trace(args.trace, fingerprint)
    prompts = read_prompts(args.prompts)
    if len(set(prompts)) < 2:
        raise RequestError(f"--prompts {args.prompts}: has one prompt, but some are held out: give at least 2")
    max_tokens = MAX_TOKENS if args.max_tokens is None else args.max_tokens
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=args.seed)
    recording = RecordingSpec(scratch / "trace.safetensors", params)
    # Not by "auto": whatever was chosen before, a new choice must be possible.
    return record(args.model, prompts, recording, EngineConfig(), "duoserve", progress=sys.stderr.isatty())
