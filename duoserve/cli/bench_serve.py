"""``duoserve bench serve``: puts a load on an OpenAI-compatible server, and measures latencies and goodput."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from functools import partial
from typing import Any

from duoserve.cli.options import Subparsers, add_parser, count, refuse_unused
from duoserve.errors import ConfigError
from duoserve.interface import Objectives
from duoserve.loadtest.figures import ATTAINED, PERCENTILES, GoodputSearch, said_of
from duoserve.loadtest.workload import ARRIVALS, BURST, Workload

EXAMPLES = """\
  duoserve bench serve --url http://127.0.0.1:8000 --rate 2 --requests 100
  duoserve bench serve --url http://127.0.0.1:8000 --arrivals burst --slo-ttft-ms 2000 --slo-tpot-ms 100 --goodput

Policies and schedulers are the server's: start it with the --policy and --scheduler that are to be compared. Requests
come at their times, whether or not others have been answered, and latencies count from there.
"""
NEEDS_EXTRA = "duoserve bench serve needs httpx: pip install 'duoserve[serve]'"
TRIALS = 8
LATE_MS = 50  # requests that are sent later than this are mentioned; latencies include the delay in any case


def add_serve(benches: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(benches, "serve", "load an OpenAI-compatible server, and measure its latencies", EXAMPLES)
    parser.add_argument("--url", required=True, help="URL of the server, with or without /v1")
    parser.add_argument("--model", help="the model to ask for (default: the first that the server has)")
    parser.add_argument(
        "--api-key", default=os.environ.get("DUOSERVE_API_KEY"), help="key to send (default: $DUOSERVE_API_KEY)"
    )
    parser.add_argument("--chat", action="store_true", help="ask for chats, not completions")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="answers of full length, where the server knows ignore_eos"
    )
    parser.add_argument("--rate", type=_positive, default=1.0, metavar="R", help="requests a second (default: 1)")
    parser.add_argument("--requests", type=count, default=50, metavar="N", help="requests of a trial (default: 50)")
    arrivals = f"poisson: one by one; burst: {BURST} at once (default: poisson)"
    parser.add_argument("--arrivals", choices=ARRIVALS, default="poisson", help=arrivals)
    parser.add_argument(
        "--max-prompt", type=count, default=1024, metavar="W", help="most words of a prompt (default: 1024)"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=512, metavar="T", help="most tokens of an answer (default: 512)"
    )
    parser.add_argument("--slo-ttft-ms", type=_positive, metavar="MS", help="objective for the first token")
    parser.add_argument("--slo-tpot-ms", type=_positive, metavar="MS", help="objective for each token after it")
    parser.add_argument("--goodput", action="store_true", help="search, from --rate on, for the highest good rate")
    parser.add_argument("--trials", type=count, metavar="N", help=f"trials of the search (default: {TRIALS})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the load (default: 0)")
    parser.add_argument(
        "--timeout", type=_positive, default=600.0, metavar="S", help="seconds for one request (default: 600)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Runs one load, or the search for goodput, with a line of progress for each trial."""
    objectives = Objectives.of_ms(args.slo_ttft_ms, args.slo_tpot_ms)
    if args.goodput and objectives == Objectives():
        raise ConfigError("--goodput counts requests inside objectives: give --slo-ttft-ms, --slo-tpot-ms or both")
    if not args.goodput:
        refuse_unused(args, ["trials"], "there is one, unless --goodput searches")
    try:
        from duoserve.loadtest.measuring import Target, measured  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"{NEEDS_EXTRA} ({error.name} is missing)") from error
    load = Workload(args.requests, args.arrivals, args.max_prompt, args.max_tokens, args.seed)
    search = GoodputSearch(args.rate, (args.trials or TRIALS) if args.goodput else 1)
    target = Target(args.url, args.model, args.api_key, args.timeout, args.chat, args.ignore_eos)
    found = asyncio.run(measured(target, load, search, objectives, say=partial(print, file=sys.stderr)))
    result = vars(load) | {"slo_ttft_ms": args.slo_ttft_ms, "slo_tpot_ms": args.slo_tpot_ms} | found
    if args.goodput:
        result |= {"goodput": search.good, "not_good": search.bad}
    print(json.dumps(result) if args.json else "\n".join(_lines(result)))


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['model']} at {result['url']}, {result['arrivals']} arrivals"]
    for trial in result["trials"]:
        lines.append(
            f"{trial['rate']:.3g} requests/s asked, {trial['requests_per_s']:.3g} answered, "
            f"{trial['tokens_per_s']:.1f} tok/s, {said_of(trial)}"
        )
        for name in ("ttft", "tpot", "itl"):
            values = [(p, trial[f"{name}_ms"][f"p{p}"]) for p in PERCENTILES]
            said = "  ".join(f"p{p} " + ("-" if value is None else f"{value:.1f}") for p, value in values)
            lines.append(f"  {name.upper()} ms  {said}")
        if trial["late_ms"] > LATE_MS:
            lines.append(
                f"  requests were sent up to {trial['late_ms']:.0f} ms late: this side is too slow for the load"
            )
        if trial["first_error"]:
            lines.append(f"  first error: {trial['first_error']}")
    if "goodput" in result:
        lines.append(_goodput(result["goodput"], result["not_good"]))
    return lines


def _goodput(good: float | None, bad: float | None) -> str:
    if good is None:
        return f"goodput: none found; {bad:.3g} requests/s are too many for {ATTAINED:.0%} inside objectives"
    above = f"below {bad:.3g}" if bad is not None else "no rate was too high: raise --rate or --trials"
    return f"goodput: {good:.3g} requests/s with {ATTAINED:.0%} inside objectives ({above})"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value
