"""``duoserve plan``: whether a model will fit and how fast it will be, from its config alone."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TypeAlias

from duoserve.byte_sizes import parse_bytes
from duoserve.cli.options import DESCRIBED_HELP, Subparsers, add_format, add_parser, refuse_unused, slots
from duoserve.cli.plan_plot import draw_plans
from duoserve.cli.plan_report import figures, lines
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.planning.formats import layout_in
from duoserve.planning.model_cards import find_model
from duoserve.planning.planner import Plan, Planner
from duoserve.planning.policy_speed import Question
from duoserve.planning.routing_curves import known_routings
from duoserve.planning.this_machine import THIS, this_machine, this_rehearsal
from duoserve.replaying.hardware import DISKS, HARDWARE, LINKS, Hardware, find_hardware

Answer: TypeAlias = Plan | MemoryBudgetError
COUNT = re.compile(r"(\d{1,9})(k?)", re.ASCII | re.IGNORECASE)
EXAMPLES = """\
  duoserve plan mixtral-8x7b --hardware rtx4090,a6000 --format int4
  duoserve plan qwen3-30b-a3b --hardware rtx4090@pcie3x16 --memory 12GiB --prompt 2k --batch 4
  duoserve plan ./my-mixtral --plot tpot.png
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "plan", "say whether a model will fit, and how fast it will be", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=DESCRIBED_HELP)
    parser.add_argument(
        "--hardware",
        default=THIS,
        metavar="NAME,...",
        help=f"'{THIS}' (the default: this machine, measured once), or any of {', '.join(HARDWARE)}, each with another "
        f"link behind an @ if need be: {', '.join(LINKS)}",
    )
    parser.add_argument("--disk", choices=list(DISKS), help="what experts beyond RAM are read from")
    parser.add_argument("--measure", action="store_true", help=f"measure '{THIS}' anew")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--memory", metavar="SIZE", help="everything on the device (default: 80 %% of what is free)")
    limit.add_argument("--expert-slots", type=slots, metavar="N", help="experts in fast memory: a count, or as 25%%")
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="RAM for experts beside the slots (default: as when loading)"
    )
    add_format(parser)
    parser.add_argument(
        "--prompt", type=_count, default=512, metavar="N", help="tokens of each prompt, as 512 or 2k (default: 512)"
    )
    parser.add_argument(
        "--new-tokens", type=_count, default=256, metavar="N", help="tokens written after each prompt (default: 256)"
    )
    parser.add_argument("--batch", type=_count, default=1, metavar="N", help="sequences at a time (default: 1)")
    parser.add_argument(
        "--max-context", type=_count, metavar="N", help="tokens in the KV cache (default: at most 4096)"
    )
    parser.add_argument(
        "--routing",
        choices=known_routings(),
        help="model whose hit rates to go by; uniform: chance (default: MODEL, or the nearest that is known)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TPOT over memory (extra: plot)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Prints a plan for each machine; raises the first refusal if none of them can run the model."""
    planner, question = Planner(args.model.lower(), find_model(args.model)), _question(args)
    names = [name.strip() for name in args.hardware.split(",")]
    if not any(name.partition("@")[0] == THIS for name in names):
        refuse_unused(args, ["measure"], f"it is {THIS!r} that is measured, and --hardware is {args.hardware}")
    machines = [_machine(name, args) for name in names]
    answers = _answers(planner, machines, question)
    if not args.disk and any(machine.name == THIS for machine, _ in _plans(machines, answers)):
        planner = _rehearsed(planner, question, anew=args.measure)  # only now, so that refusals need not wait for it
        answers = _answers(planner, machines, question)
    if args.json:
        print(json.dumps({"model": args.model, "plans": [figures(planner, answer) for answer in answers]}))
    else:
        for machine, answer in zip(machines, answers, strict=True):
            print("\n".join(lines(planner, machine, answer)))
    if args.plot is not None:
        draw_plans(args.plot, planner, [plan for _, plan in _plans(machines, answers)])


def _count(text: str) -> int:
    match = COUNT.fullmatch(text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no count of 1 or more, such as 512 or 2k")
    return int(match[1]) * (1024 if match[2] else 1)


def _question(args: argparse.Namespace) -> Question:
    memory, host_memory = (None if size is None else parse_bytes(size) for size in (args.memory, args.host_memory))
    return Question(
        prompt=args.prompt,
        batch=args.batch,
        new_tokens=args.new_tokens,
        form=args.format,
        memory=memory,
        expert_slots=args.expert_slots,
        host_memory=host_memory,
        max_context=args.max_context,
        routing=args.routing,
    )


def _machine(text: str, args: argparse.Namespace) -> Hardware:
    """A card, or this machine, with another link or disk if given."""
    name, _, link = text.partition("@")
    if name == THIS:
        if args.measure:
            print("measuring this machine", file=sys.stderr)
        found = this_machine(anew=args.measure)
    else:
        found = find_hardware(name)
    if link and link not in LINKS:
        raise ConfigError(f"link {link!r} is not known: use one of {', '.join(LINKS)}")
    if args.disk:  # a single reader gets all of it, as on cards: the measured rate belongs to the disk that is here
        found = replace(found, disk=DISKS[args.disk], reader=inf)
    return replace(found, name=text, link=LINKS[link] if link else found.link)


def _answers(planner: Planner, machines: list[Hardware], question: Question) -> list[Answer]:
    """An answer for each machine; raises the first machine's refusal if none of them can run the model."""
    answers = [_answer(planner, machine, question) for machine in machines]
    if isinstance(answers[0], MemoryBudgetError) and not any(_plans(machines, answers)):
        raise answers[0]
    return answers


def _answer(planner: Planner, machine: Hardware, question: Question) -> Answer:
    try:
        return planner.plan(machine, question)
    except MemoryBudgetError as refusal:
        return refusal


def _plans(machines: list[Hardware], answers: list[Answer]) -> Iterator[tuple[Hardware, Plan]]:
    """The machines that can run the model, and their plans."""
    pairs = zip(machines, answers, strict=True)
    return ((machine, answer) for machine, answer in pairs if isinstance(answer, Plan))


def _rehearsed(planner: Planner, question: Question, *, anew: bool) -> Planner:
    """The planner with a rehearsal on this machine, if one can be made."""
    config = planner.model.config
    layout = layout_in(config, question.form, config.dtype)
    found = this_rehearsal(planner.model, layout, question.prompt, anew=anew)
    return replace(planner, rehearsals={} if found is None else {THIS: found})
