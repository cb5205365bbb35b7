"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from duoserve.experts.pack_format import DTYPES

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # generic for type checkers only

MODEL_HELP = 'a folder, a hub id (owner/name), or "bard", the embedded model'


def add_parser(commands: Subparsers, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A command's parser, with ``examples`` below its options."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_dtype(parser: argparse._ActionsContainer) -> None:
    """``--dtype``: "auto" is the checkpoint's."""
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: the checkpoint's")
