"""``duoserve plan``: will it fit and how fast will it be, from the config alone."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from duoserve.cli.options import MODEL_HELP, Subparsers, add_parser, slots
from duoserve.cli.plan_plot import draw_plans
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.budget import format_bytes, parse_bytes
from duoserve.planning.formats import FORMATS
from duoserve.planning.model_cards import MODEL_CARDS, find_model
from duoserve.planning.planner import Plan, Planner, Question, Speed
from duoserve.planning.this_machine import THIS, this_machine
from duoserve.scheduling.hardware import DISKS, HARDWARE, LINKS, Hardware, find_hardware

COUNT = re.compile(r"(\d{1,9})(k?)", re.ASCII | re.IGNORECASE)
EXAMPLES = """\
  duoserve plan mixtral-8x7b --hardware rtx4090,a6000 --format int4
  duoserve plan qwen3-30b-a3b --hardware rtx4090@pcie3x16 --memory 12GiB --prompt 2k --batch 4
  duoserve plan ./my-mixtral --plot tpot.png
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "plan", "say whether a model will fit, and how fast it will be", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or one of {', '.join(MODEL_CARDS)}")
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
    parser.add_argument("--host-memory", metavar="SIZE", help="RAM for experts that have no slot")
    parser.add_argument("--format", choices=FORMATS, help="of the experts (default: the checkpoint's)")
    parser.add_argument("--prompt", type=_count, default=512, metavar="N", help="tokens, as 512 or 2k (default: 512)")
    parser.add_argument("--new-tokens", type=_count, default=256, metavar="N", help="behind a prompt (default: 256)")
    parser.add_argument("--batch", type=_count, default=1, metavar="N", help="sequences at a time (default: 1)")
    parser.add_argument("--max-context", type=_count, metavar="N", help="tokens that the KV cache holds")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TPOT over memory (extra: plot)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Prints a plan for each machine; the refusal is an error where none of them can run the model."""
    planner, question = Planner(args.model.lower(), find_model(args.model)), _question(args)
    machines = [_machine(name.strip(), args) for name in args.hardware.split(",")]
    answers = [_answer(planner, machine, question) for machine in machines]
    plans = [answer for answer in answers if isinstance(answer, Plan)]
    if not plans and isinstance(answers[0], MemoryBudgetError):
        raise answers[0]
    if args.json:
        print(json.dumps({"model": args.model, "plans": [_figures(planner, answer) for answer in answers]}))
    else:
        for machine, answer in zip(machines, answers, strict=True):
            print("\n".join(_lines(planner, machine, answer)))
    if args.plot is not None:
        draw_plans(args.plot, planner, plans)


def _count(text: str) -> int:
    match = COUNT.fullmatch(text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 512 or 2k")
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
    )


def _machine(text: str, args: argparse.Namespace) -> Hardware:
    """A card, or this machine, with another link or disk where that is wanted."""
    name, _, link = text.partition("@")
    if name == THIS:
        if args.measure:
            print("measuring this machine", file=sys.stderr)
        found = this_machine(anew=args.measure)
    else:
        found = find_hardware(name)
    if link and link not in LINKS:
        raise ConfigError(f"link {link!r} is not known: use one of {', '.join(LINKS)}")
    link_rate = LINKS[link] if link else found.link
    disk_rate = DISKS[args.disk] if args.disk else found.disk
    return replace(found, name=text, link=link_rate, disk=disk_rate)


def _answer(planner: Planner, machine: Hardware, question: Question) -> Plan | MemoryBudgetError:
    try:
        return planner.plan(machine, question)
    except MemoryBudgetError as refusal:
        return refusal


def _figures(planner: Planner, answer: Plan | MemoryBudgetError) -> dict[str, Any]:
    """JSON-able; sizes in bytes, times in seconds."""
    if isinstance(answer, MemoryBudgetError):
        return {"refusal": str(answer)}
    memory = answer.memory
    return {
        "hardware": answer.hardware.name,
        "experts": answer.layout.name,
        "slot_bytes": memory.slot_bytes,
        "slots": memory.num_slots,
        "total_experts": memory.total_experts,
        "dense_bytes": memory.dense_bytes,
        "kv_bytes": memory.kv_bytes,
        "workspace_bytes": memory.workspace_bytes,
        "total_bytes": memory.total_bytes,
        "host_bytes": memory.host_bytes,
        "best": answer.best.policy,
        "policies": [_speed(speed) for speed in answer.speeds.values()],
        "routing": answer.routing,
        "notes": list(answer.notes),
        "would_buy": {
            name: {"slots": other.memory.num_slots, "tpot_s": other.best.tpot.total, "ttft_s": other.best.ttft.total}
            for name, other in _others(planner, answer)
        },
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "policy": speed.policy,
        "ttft_s": speed.ttft.total,
        "first_ttft_s": speed.first_ttft_s,
        "ttft_bound": speed.ttft.bound,
        "tpot_s": speed.tpot.total,
        "tpot_bound": speed.tpot.bound,
        "tpot_busy_s": dict(speed.tpot.busy),
        "hit_rate": speed.hit_rate,
    }


def _others(planner: Planner, plan: Plan) -> Iterator[tuple[str, Plan]]:
    for name, other in (("1 GiB more", planner.one_gib_more(plan)), ("int4", planner.in_int4(plan))):
        if other is not None:
            yield name, other


def _lines(planner: Planner, machine: Hardware, answer: Plan | MemoryBudgetError) -> Iterator[str]:
    if isinstance(answer, MemoryBudgetError):
        yield from (f"{machine.name}: cannot run it", f"  {answer}", "")
        return
    question, batch = answer.question, answer.question.batch
    yield (
        f"{machine.name}: experts in {answer.layout.name}, {format_bytes(answer.memory.slot_bytes)} each; "
        f"{batch} x {question.prompt} tokens and {question.new_tokens} new ones"
    )
    yield from (f"  {line}" for line in str(answer.memory).splitlines())
    yield f"  {'policy':<16}{'TTFT':>10}{'bound':>10}{'TPOT':>12}{'bound':>10}{'tok/s':>9}{'hits':>8}"
    yield from (_row(speed, batch) for speed in answer.speeds.values())
    yield f"  best: {answer.best.policy}; the first prompt, with empty slots, takes {answer.best.first_ttft_s:.2f} s"
    for name, other in _others(planner, answer):
        faster = answer.best.tpot.total / other.best.tpot.total
        yield f"  {name}: {other.memory.num_slots} slots, TPOT {_milliseconds(other.best)}, {faster:.2f}x as fast"
    yield from (f"  note: {note}" for note in answer.notes)
    yield ""


def _row(speed: Speed, batch: int) -> str:
    hits = f"{speed.hit_rate:.1%}" if speed.hit_rate else "-"
    rate = batch / speed.tpot.total
    times = f"{speed.ttft.total:>8.2f} s{speed.ttft.bound:>10}{_milliseconds(speed):>12}{speed.tpot.bound:>10}"
    return f"  {speed.policy:<16}{times}{rate:>9.1f}{hits:>8}"


def _milliseconds(speed: Speed) -> str:
    return f"{1e3 * speed.tpot.total:.2f} ms"
