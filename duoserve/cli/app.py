"""The command line's frame: commands, errors and exit codes (0 done, 1 refused or failed, 2 wrong usage)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from duoserve import __version__
from duoserve.cli import bench, chat, evaluate, generate, info, pack, plan, replay, serve, trace, train_predictor
from duoserve.errors import DuoServeError

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells report them

EPILOG = """\
examples:
  duoserve generate --prompt "To be, or" --expert-slots 25%
  duoserve info mistralai/Mixtral-8x7B-v0.1
  duoserve pack ./my-mixtral
  duoserve serve bard --expert-slots 25%

duoserve COMMAND --help shows the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors of duoserve become one line on stderr."""
    args = command_line().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.command
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models write what a terminal's encoding may not have
    try:
        command(args)
        sys.stdout.flush()
    except DuoServeError as error:
        print(f"duoserve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="duoserve",
        description="Runs Mixture-of-Experts language models whose experts do not fit in fast memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"duoserve {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (generate, chat, info, plan, pack, trace, train_predictor, replay, evaluate, serve, bench):
        module.add_command(commands)
    return parser


def _discard_stdout() -> None:
    """Nobody reads stdout any more: the flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
