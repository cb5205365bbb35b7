"""``duoserve replay``: the costs of every policy on a trace, without the model and without the machine."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duoserve.byte_sizes import format_bytes
from duoserve.cli.hardware_option import add_hardware, replayed_on
from duoserve.cli.options import (
    DESCRIBED_HELP,
    Subparsers,
    add_format,
    add_parser,
    count,
    natural,
    refuse_to_replace,
    refuse_unused,
)
from duoserve.cli.plots import draw, one_step
from duoserve.cli.replay_report import contestants, slot_counts, table
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.device import CPU, free_bytes
from duoserve.files.whole import refused_as
from duoserve.planning.model_cards import find_model
from duoserve.planning.sizes import layer_sizes
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.files import check_shape, load_predictor
from duoserve.predictors.training import train
from duoserve.replaying.bake_off import bake_off, contestant, rows
from duoserve.replaying.hardware import Machine
from duoserve.scheduling.policies import POLICIES
from duoserve.scheduling.predictor import Predictor
from duoserve.traces.synthetic import CARDS, RoutingCard, bytes_needed, synthesize
from duoserve.traces.trace import Trace, TraceMeta
from duoserve.traces.trace_file import open_trace

MADE_UP = "synthetic:"
# The defaults of the options that describe a made-up trace.
USUAL = {"requests": 4, "tokens": 128, "prompt_tokens": 128, "precision": 0.8, "seed": 0}
# This many more requests are made up, on which predictors learn what look-ahead scores are worth.
LEARNED_FROM = 4
BY_LOOKAHEAD = ("lookahead", "duoserve")
EXAMPLES = """\
  duoserve replay bard-trace.safetensors --model bard --hardware rtx4090
  duoserve replay synthetic:qwen3-30b-a3b --hardware a5000 --slots 12.5%,25% --policies lru,duoserve,oracle
  duoserve replay t.safetensors --model ./my-mixtral --hardware pcie4 --slots 64,128 --csv t.csv --plot t.png
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "replay", "compare policies on a trace, on a virtual clock", EXAMPLES)
    parser.add_argument(
        "trace", metavar="TRACE", help=f"what duoserve trace wrote, or synthetic:NAME for one of {', '.join(CARDS)}"
    )
    add_hardware(parser)
    parser.add_argument("--model", metavar="MODEL", help=f"the model whose sizes count: {DESCRIBED_HELP}")
    add_format(parser)
    parser.add_argument(
        "--slots",
        default="12.5%,25%,50%",
        metavar="N,...",
        help="slots over all layers: counts, or shares of the experts (default: 12.5%%,25%%,50%%)",
    )
    parser.add_argument(
        "--policies", default="all", metavar="NAME,...", help="policies to compare (default: all, and oracle)"
    )
    parser.add_argument(
        "--predictor",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file that duoserve train-predictor wrote, for the policy of its kind; give one for each kind",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of the rows instead of a table")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw hit rates and a decode step (extra: plot)")
    _add_synthetic(parser)
    parser.set_defaults(command=run)


def _add_synthetic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("synthetic traces")
    group.add_argument(
        "--requests", type=count, metavar="N", help=f"requests to make up (default: {USUAL['requests']})"
    )
    group.add_argument(
        "--tokens", type=natural, metavar="N", help=f"decode steps of each request (default: {USUAL['tokens']})"
    )
    group.add_argument(
        "--prompt-tokens", type=count, metavar="N", help=f"tokens of each prompt (default: {USUAL['prompt_tokens']})"
    )
    guessing = (
        f"recall of the look-ahead scores, by which {' and '.join(BY_LOOKAHEAD)} guess (default: {USUAL['precision']})"
    )
    group.add_argument("--precision", type=float, metavar="P", help=guessing)
    group.add_argument("--seed", type=natural, metavar="S", help=f"seed of what is made up (default: {USUAL['seed']})")


def run(args: argparse.Namespace) -> None:
    """Replays, with a progress bar if stderr is a terminal, and prints a row for each slot count and policy."""
    names = contestants(args.policies)
    trace, predictors = _made_up(args) if args.trace.startswith(MADE_UP) else _recorded(args, names)
    model = args.model or _made_after(trace)
    sizes = replace(layer_sizes(find_model(model), args.format), name=model)
    machine = Machine(replayed_on(args.hardware), sizes)
    slots = slot_counts(args.slots, trace.meta.shape)
    _say_who_goes_without(names, predictors)
    runs = bake_off(trace, machine, slots, names, predictors)
    runs = tqdm(runs, total=len(slots) * len(names), unit="replay", disable=not sys.stderr.isatty())
    made = list(rows(runs, trace, machine))
    if args.json:
        print(json.dumps(made))
    else:
        print("\n".join(table(made)))
    if args.csv is not None:
        _write_csv(args.csv, made)
    if args.plot is not None:
        policy, predictor = contestant(names[-1], trace, predictors)
        lanes = one_step(trace, policy, machine, slots[0], predictor)
        draw(args.plot, made, lanes, f"{machine.sizes.name} on {machine.hardware.name}; below: {policy.name}")


def _recorded(args: argparse.Namespace, names: Sequence[str]) -> tuple[Trace, dict[str, Predictor]]:
    """A trace of the requests that no predictor was trained on, and the predictors by kind."""
    refuse_unused(args, USUAL, f"say what {MADE_UP}NAME makes up, but {args.trace} was recorded")
    for option in ("csv", "plot"):
        if getattr(args, option) is not None:
            refuse_to_replace(Path(args.trace), f"--{option}", getattr(args, option))
    trace = open_trace(Path(args.trace))
    predictors = _predictors(args.predictor, trace.meta, names)
    known = frozenset[str]().union(*(predictor.trained_on for predictor in predictors.values()))
    new = [number for number, mark in enumerate(trace.prompt_marks) if mark not in known]
    if len(new) < len(trace):
        if not new:
            raise ConfigError(f"--predictor: has been trained on every prompt of {args.trace}: give a trace of others")
        print(f"{len(new)} of {len(trace)} requests are replayed: --predictor knows the others", file=sys.stderr)
        trace = trace.select(new)
    return trace, dict(predictors)


def _made_up(args: argparse.Namespace) -> tuple[Trace, dict[str, Predictor]]:
    """A trace, and predictors by look-ahead scores that were trained on others like it."""
    if args.predictor:
        raise ConfigError(f"--predictor: {args.trace} is predicted by what learns from others like it: give none")
    name = args.trace.removeprefix(MADE_UP)
    if name not in CARDS:
        raise ConfigError(f"synthetic trace {name!r} is not known: use one of {', '.join(CARDS)}")
    given = {name: value for name, value in vars(args).items() if name in USUAL and value is not None}
    wanted: dict[str, Any] = USUAL | given
    requests, prompt = wanted.pop("requests"), wanted.pop("prompt_tokens")
    _check_room(CARDS[name], requests + LEARNED_FROM, prompt + wanted["tokens"])
    made = synthesize(CARDS[name], requests + LEARNED_FROM, prompt=prompt, **wanted)
    guesser, _ = train(made.select(range(requests, requests + LEARNED_FROM)), "lookahead")
    return made.select(range(requests)), dict.fromkeys(BY_LOOKAHEAD, guesser)


def _check_room(card: RoutingCard, requests: int, tokens: int) -> None:
    """Raises MemoryBudgetError if RAM cannot hold the trace, and the two traces that it is then divided into."""
    needed, free = 2 * bytes_needed(card, requests, tokens), free_bytes(CPU)
    if needed > free:
        raise MemoryBudgetError(
            f"{requests} requests ({LEARNED_FROM} of them to learn from) x {tokens} tokens x {card.num_layers} layers "
            f"of {card.num_experts} experts take about {format_bytes(needed)}, but {format_bytes(free)} of RAM are "
            "free: lower --tokens, --prompt-tokens or --requests"
        )


def _predictors(paths: Sequence[Path], meta: TraceMeta, names: Sequence[str]) -> dict[str, RowPredictor]:
    """The predictors in ``paths`` by kind; raises ConfigError for one that no policy of these ``names`` would use."""
    taken = {POLICIES[name].predictor for name in names if name in POLICIES}
    found: dict[str, RowPredictor] = {}
    for path in paths:
        predictor = load_predictor(path, meta.fingerprint)
        check_shape(predictor.meta, meta.shape, path)
        if predictor.name not in taken:
            raise ConfigError(f"--predictor {path}: none of {', '.join(names)} takes the kind {predictor.name!r}")
        if predictor.name in found:
            raise ConfigError(f"--predictor {path}: is the second of the kind {predictor.name!r}: give one")
        found[predictor.name] = predictor
    return found


def _say_who_goes_without(names: Sequence[str], predictors: Mapping[str, Predictor]) -> None:
    kinds = {name: POLICIES[name].predictor for name in names if name in POLICIES}
    without = [name for name, kind in kinds.items() if kind is not None and kind not in predictors]
    if without:
        print(f"without guesses, for want of a --predictor of their kind: {', '.join(without)}", file=sys.stderr)


def _made_after(trace: Trace) -> str:
    """The model that a synthetic trace is made after; raises ConfigError for a recorded trace."""
    if not trace.meta.fingerprint.startswith(MADE_UP):
        raise ConfigError("the trace does not say how large the model's experts are: give --model")
    return trace.meta.fingerprint.removeprefix(MADE_UP)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with refused_as(ConfigError, f"--csv {path}: cannot be written"), path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
