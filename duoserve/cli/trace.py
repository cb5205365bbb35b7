"""``duoserve trace``: runs prompts and records what the routers choose."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from duoserve.byte_sizes import format_bytes
from duoserve.cli.options import MODEL_HELP, Subparsers, add_loading, add_parser, loading
from duoserve.cli.prompts import read_prompts
from duoserve.cli.sampling_options import folder_with_text
from duoserve.config import EngineConfig
from duoserve.sampling import SamplingParams
from duoserve.tracing import RecordingSpec, record

EXAMPLES = """\
  duoserve trace bard --prompts prompts.txt --out bard-trace.safetensors
  duoserve trace ./my-mixtral --prompts chats.jsonl --out t.safetensors --max-tokens 256 --memory 12GiB
  duoserve trace ./my-mixtral --prompts chats.jsonl --out t.safetensors --max-tokens 256 --resume
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "trace", "record what a model's routers choose", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='one prompt a line; in a file named .jsonl each line is a JSON text, or an object with a "prompt"',
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the trace, a safetensors file")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", default=128, help="tokens for each prompt (default: 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=1.0,
        help="temperature of the draw (default: 1, as the model is)",
    )
    seeds = "seed of the first prompt (default: 0); each later one takes the next integer"
    parser.add_argument("--seed", type=int, metavar="S", default=0, help=seeds)
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with a trace that was interrupted")
    there.add_argument("--append", action="store_true", help="add these prompts to a trace of others")
    parser.add_argument("--json", action="store_true", help="print what was recorded as a JSON object")
    add_loading(parser, predicts=False)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Records, with a progress bar if stderr is a terminal, and prints how much there is then."""
    prompts = read_prompts(args.prompts)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    recording = RecordingSpec(args.out, params, args.resume, args.append)
    options = loading(args)
    policy = options.pop("policy")
    folder_with_text(args.model)
    trace = record(args.model, prompts, recording, EngineConfig.of(**options), policy, progress=sys.stderr.isatty())
    size = args.out.stat().st_size
    figures = {"requests": len(trace), "tokens": trace.num_tokens, "layers": len(trace.meta.layers), "bytes": size}
    if args.json:
        print(json.dumps(figures | {"fingerprint": trace.meta.fingerprint}))
    else:
        print(f"{args.out}: {len(trace)} requests, {trace.num_tokens} tokens, {format_bytes(size)}")
