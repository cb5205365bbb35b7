"""``duoserve generate``: continues a prompt, as text printed as it comes, or as one JSON object with figures."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from duoserve.cli.options import MODEL_HELP, Subparsers, add_loading, add_parser, loading
from duoserve.cli.sampling_options import add_sampling, folder_with_text, sampling
from duoserve.errors import RequestError
from duoserve.moe_model import MoEModel
from duoserve.sampling import SamplingParams

EXAMPLES = """\
  duoserve generate --prompt "To be, or" --expert-slots 25%
  duoserve generate ./my-mixtral --memory 12GiB --temperature 0 --max-tokens 200 < prompt.txt
  duoserve generate bard --prompt "Enter HAMLET" --seed 7 --stop "Exit" --json
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "generate", "complete a prompt", EXAMPLES)
    parser.add_argument("model", nargs="?", default="bard", help=f"{MODEL_HELP} (default: bard)")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue (default: what stdin says)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    add_sampling(parser)
    add_loading(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Generates to stdout. Errors of the request are reported before the model is loaded."""
    params = sampling(args)
    prompt = _stdin() if args.prompt is None else args.prompt
    folder_with_text(args.model)
    with MoEModel.from_pretrained(args.model, **loading(args)) as model:
        if args.json:
            print(json.dumps(_report(args.model, model, prompt, params)))
        else:
            _stream(model, prompt, params)


def _stdin() -> str:
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on stdin is not {error.encoding} text: {error.reason}") from error


def _stream(model: MoEModel, prompt: str, params: SamplingParams) -> None:
    last = ""
    for last in model.stream(prompt, params):
        print(last, end="", flush=True)
    if not last.endswith("\n"):
        print()


def _report(name: str, model: MoEModel, prompt: str, params: SamplingParams) -> dict[str, Any]:
    done = model.generate(prompt, params)
    return {
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "stats": done.stats.to_dict(),
        "model": {
            "name": name,
            "model_type": model.config.model_type,
            "policy": model.policy,
            "experts": model.memory.total_experts,
            "slots": model.memory.num_slots,
            "slot_bytes": model.memory.slot_bytes,
            "memory_bytes": model.memory.total_bytes,
            "host_bytes": model.memory.host_bytes,
        },
    }
