"""The command line's frame: commands, errors and exit codes (0 done, 1 refused or failed, 2 wrong usage)."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path

from duoserve import __version__
from duoserve.cli import bench, chat, evaluate, generate, info, pack, plan, replay, serve, trace, train_predictor
from duoserve.errors import DuoServeError

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells report them
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the errors of a disk that takes no more

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
    _open_closed_streams()
    try:
        try:
            return _carry_out(argv)
        finally:  # also after an error or --help: the flush at exit would not say what is wrong
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in FULL:
            raise
        _discard_stdout()
        return _failed(f"{error}: make room, or write elsewhere")


def _carry_out(argv: Sequence[str] | None) -> int:
    args = command_line().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.command
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models write characters that a terminal's encoding may lack
    try:
        command(args)
    except DuoServeError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _failed(why: str) -> int:
    print(f"duoserve: error: {' '.join(why.split())}", file=sys.stderr)
    return 1


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


def _open_closed_streams() -> None:
    """Replaces streams that the shell has closed (``>&-``), which are None, by the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - until the process ends


def _discard_stdout() -> None:
    """Sends stdout to the null device once it is closed or full, so that the flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
