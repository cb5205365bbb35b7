"""Shared by commands that write text: options for drawing tokens, and the check for a tokenizer."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from duoserve.errors import RequestError
from duoserve.experts.hub import TEXT_FILES, resolve_model
from duoserve.files.positional import is_there
from duoserve.sampling import SamplingParams
from duoserve.text.tokenizer import TOKENIZER

SAMPLING = {
    "max_tokens": (int, "N", "most tokens to write"),
    "temperature": (float, "T", "temperature of the draw; 0 takes the most likely token"),
    "top_k": (int, "K", "draw from the K most likely tokens; 0: off"),
    "top_p": (float, "P", "draw from the most likely tokens that together reach probability P"),
    "min_p": (float, "P", "draw from tokens at least P times as likely as the most likely one"),
    "repetition_penalty": (float, "R", "above 1, tokens that have occurred become less likely"),
    "seed": (int, "S", "seed that makes the draw repeatable"),
}


def folder_with_text(model: str) -> Path:
    """The folder of ``model``, without its weights if it is a hub id; raises RequestError if it has no tokenizer."""
    folder = resolve_model(model, TEXT_FILES)
    if not is_there(folder / TOKENIZER):
        raise RequestError(f"{model} has no {TOKENIZER}, which text needs: give token ids in Python, to generate()")
    return folder


def add_sampling(parser: argparse.ArgumentParser, *, fills_context: bool = False) -> None:
    """Adds the fields of SamplingParams as options. With ``fills_context`` the default of --max-tokens is None."""
    group = parser.add_argument_group("sampling")
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name, (kind, metavar, help_text) in SAMPLING.items():
        default, note = defaults[name], "" if defaults[name] is None else f" (default: {defaults[name]})"
        if fills_context and name == "max_tokens":
            default, note = None, " (default: as many as the context holds)"
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=help_text + note)
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before TEXT; up to four times")
    group.add_argument("--ignore-eos", action="store_true", help="write on after the model's end token")


def sampling(args: argparse.Namespace) -> SamplingParams:
    """The SamplingParams that the options of ``add_sampling`` give."""
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return SamplingParams(stop=tuple(args.stop), ignore_eos=args.ignore_eos, **given)
