"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from duoserve.config import DECODE_MODES, QUANTIZE, EngineConfig
from duoserve.errors import ConfigError, RequestError
from duoserve.experts.layout import DTYPES
from duoserve.files.positional import is_file
from duoserve.planning.formats import FORMATS
from duoserve.planning.model_cards import MODEL_CARDS
from duoserve.scheduling.policies import POLICIES

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # generic for type checkers only

MODEL_HELP = 'a folder, a hub id (owner/name or owner/name@revision), or an embedded model, "bard" or "bard-fine"'
DESCRIBED_HELP = f"{MODEL_HELP}, or one of {', '.join(MODEL_CARDS)}; no weights are needed"
LOADING = (*(field.name for field in fields(EngineConfig)), "policy", "predictor")


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
    """Adds ``--dtype``; "auto" is the checkpoint's."""
    what = "dtype of weights that are not quantized (default: auto, the checkpoint's)"
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=what)


def add_loading(parser: argparse.ArgumentParser, *, predicts: bool = True) -> None:
    """Adds the options for loading a model, which ``loading`` reads; ``--predictor`` only if it ``predicts``."""
    group = parser.add_argument_group("memory and device")
    limit = group.add_mutually_exclusive_group()
    limit.add_argument("--expert-slots", type=slots, metavar="N", help="experts in fast memory: a count, or as 25%%")
    limit.add_argument("--expert-memory", metavar="SIZE", help="memory for the slots, as 4GiB")
    limit.add_argument(
        "--memory", metavar="SIZE", help="memory for everything: slots, dense weights, KV cache, workspace"
    )
    kept = "RAM for packed experts, the model's first ones (default: on a CPU none, behind a GPU 80 %% of the free RAM)"
    group.add_argument("--host-memory", metavar="SIZE", default="auto", help=kept)
    context = "tokens that the KV cache holds, of all requests (default: the model's positions, at most 4096)"
    group.add_argument("--max-context", type=int, metavar="N", help=context)
    threads = "threads that bring experts into slots (default: 2)"
    group.add_argument("--copy-threads", type=count, metavar="N", default=argparse.SUPPRESS, help=threads)
    what = "which experts are kept, and when they are fetched"
    group.add_argument("--policy", default="auto", metavar="NAME", help=f"{what}: auto, {', '.join(POLICIES)}")
    if predicts:
        what = "a file that train-predictor wrote, or auto: the one beside the model; for policies that guess in decode"
        default = "default: with --policy auto the one that evaluate recommends, else none"
        group.add_argument("--predictor", metavar="FILE", help=f"{what} ({default})")
    group.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto, a GPU if there is one)")
    add_dtype(group)
    launched = "how a decode step is launched: compiled is for CPUs, event and graph are for GPUs (default: auto)"
    group.add_argument("--decode-mode", choices=DECODE_MODES, default="auto", help=launched)
    add_quantize(group)
    group.add_argument("--invariant", action="store_true", help="no request of a batch changes the bits of another")


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The given options of ``add_loading``, as arguments of ``MoEModel.from_pretrained``, which has the defaults."""
    return {name: getattr(args, name) for name in LOADING if name in args}


def refuse_unused(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises ConfigError, which says ``why``, if any of these arguments was given, so is neither None nor False."""
    given = [name for name in names if getattr(args, name) is not None and getattr(args, name) is not False]
    if given:
        raise ConfigError(f"{' and '.join('--' + name.replace('_', '-') for name in given)}: {why}")


def refuse_to_replace(trace: Path, option: str, written: Path) -> None:
    """RequestError where the file ``written``, which ``option`` names, is the ``trace`` that is read."""
    if is_file(trace) and is_file(written) and written.samefile(trace):
        raise RequestError(f"{option} {written}: is the trace itself; give another name")


def add_quantize(parser: argparse._ActionsContainer) -> None:
    """Adds ``--quantize``; None leaves experts as they are."""
    what = "make experts that are in floats smaller: bf12 without loss, the others less exact"
    parser.add_argument("--quantize", choices=QUANTIZE, help=what)


def add_format(parser: argparse._ActionsContainer) -> None:
    """Adds ``--format``; None is the checkpoint's."""
    parser.add_argument("--format", choices=FORMATS, help="format of the experts (default: the checkpoint's)")


def count(text: str) -> int:
    """An integer of 1 or more that is small enough for sizes to be computed from it."""
    value = int(text)
    if not 1 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not a count in 1..{(1 << 63) - 1}")
    return value


def natural(text: str) -> int:
    """An integer of 0 or more that every random generator takes as a seed."""
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not an integer in 0..{(1 << 63) - 1}")
    return value


def slots(text: str) -> int | str:
    """A count, or text that the library checks."""
    return int(text) if text.isdecimal() else text
