"""``duoserve generate``: a prompt in, text out as it comes, or one JSON object with the figures."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from duoserve.cli.options import MODEL_HELP, Subparsers, add_loading, add_parser, loading
from duoserve.errors import RequestError
from duoserve.experts.hub import resolve_model
from duoserve.experts.positional_file import is_there
from duoserve.moe_model import MoEModel
from duoserve.sampling import SamplingParams
from duoserve.text import TOKENIZER

EXAMPLES = """\
  duoserve generate --prompt "To be, or" --expert-slots 25%
  duoserve generate ./my-mixtral --memory 12GiB --temperature 0 --max-tokens 200 < prompt.txt
  duoserve generate bard --prompt "Enter HAMLET" --seed 7 --stop "Exit" --json
"""
SAMPLING = {
    "max_tokens": (int, "N", "most tokens to write"),
    "temperature": (float, "T", "0 takes the most likely token"),
    "top_k": (int, "K", "draw from the K most likely tokens; 0: off"),
    "top_p": (float, "P", "draw from the most likely tokens that together reach probability P"),
    "min_p": (float, "P", "draw from tokens at least P times as likely as the most likely one"),
    "repetition_penalty": (float, "R", "above 1, tokens that have occurred become less likely"),
    "seed": (int, "S", "makes the draw repeatable"),
}


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "generate", "complete a prompt", EXAMPLES)
    parser.add_argument("model", nargs="?", default="bard", help=f"{MODEL_HELP} (default: bard)")
    parser.add_argument("--prompt", metavar="TEXT", help="default: what stdin says")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    add_sampling(parser)
    add_loading(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Generates to stdout. What is wrong with the request is said before the model is loaded."""
    params = sampling(args)
    prompt = _stdin() if args.prompt is None else args.prompt
    with MoEModel.from_pretrained(folder_with_text(args.model), **loading(args)) as model:
        if args.json:
            print(json.dumps(_report(args.model, model, prompt, params)))
        else:
            _stream(model, prompt, params)


def folder_with_text(model: str) -> Path:
    """The folder of ``model``; RequestError where it has no tokenizer, before anything is loaded."""
    folder = resolve_model(model)
    if not is_there(folder / TOKENIZER):
        raise RequestError(f"{model} has no {TOKENIZER}, which text needs: give token ids in Python, to generate()")
    return folder


def add_sampling(parser: argparse.ArgumentParser, *, fills_context: bool = False) -> None:
    """The fields of SamplingParams as options; ``fills_context``: no --max-tokens is None, and not their default."""
    group = parser.add_argument_group("sampling")
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name, (kind, metavar, help_text) in SAMPLING.items():
        default, note = defaults[name], "" if defaults[name] is None else f" (default: {defaults[name]})"
        if fills_context and name == "max_tokens":
            default, note = None, " (default: as many as the context holds)"
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=help_text + note)
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before TEXT; up to four times")


def sampling(args: argparse.Namespace) -> SamplingParams:
    """What ``add_sampling`` was given."""
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return SamplingParams(stop=tuple(args.stop), **given)


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
