"""``duoserve serve``: a model behind OpenAI's HTTP interface, for this machine only unless told otherwise."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, get_args, get_type_hints

from duoserve.cli.options import MODEL_HELP, Subparsers, add_loading, add_parser, loading
from duoserve.errors import ConfigError
from duoserve.interface import Objectives, ServiceSettings
from duoserve.moe_model import MoEModel
from duoserve.server.settings import ServerSettings
from duoserve.service.async_engine import AsyncEngine

EXAMPLES = """\
  duoserve serve bard --expert-slots 25%
  duoserve serve ./my-mixtral --memory 12GiB --slo-ttft-ms 2000 --slo-tpot-ms 100 --admission strict
  DUOSERVE_API_KEY=secret duoserve serve ./my-mixtral --host 0.0.0.0 --port 8080
"""
TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
NEEDS_EXTRA = "duoserve serve needs starlette, uvicorn and prometheus_client: pip install 'duoserve[serve]'"


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "serve", "answer HTTP requests as OpenAI's servers do", EXAMPLES)
    parser.add_argument("model", nargs="?", default="bard", help=f"{MODEL_HELP} (default: bard)")
    _add_http(parser)
    _add_service(parser)
    add_loading(parser)
    take_environment(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Serves until it is told to stop."""
    try:
        from duoserve.server.run import serve  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"{NEEDS_EXTRA} ({error.name} is missing)") from error
    service = _service_settings(args)
    settings = ServerSettings(
        name=args.served_model_name or args.model,
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        allowed_hosts=tuple(filter(None, map(str.strip, args.allowed_hosts.split(",")))),
        shutdown_s=args.shutdown_timeout,
        ping_s=args.ping_interval,
    )
    serve(settings, lambda: _load(args.model, loading(args), service), _say_ready)


def take_environment(parser: argparse.ArgumentParser) -> None:
    """Makes environment variables the defaults of options: ``DUOSERVE_MAX_BATCH`` that of ``--max-batch``, and so on.

    If a Kubernetes Service is called duoserve, DUOSERVE_PORT is set to an address, which is ignored.
    """
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            name = f"DUOSERVE_{action.dest.upper()}"
            action.help = f"{action.help} [{name}]"
            if action.choices is not None:
                action.type = _one_of(list(action.choices))
            if action.nargs == 0:
                action.type = _truth  # argparse applies it to a default that is text
            value = os.environ.get(name)
            if value is None or (name == "DUOSERVE_PORT" and value.startswith("tcp://")):
                continue
            action.default = value
            if callable(action.type):
                action.type = _naming(name, value, action.type)


def _naming(name: str, value: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type ``kind``; if the text is ``value``, from the variable ``name``, its error names that variable."""

    @wraps(kind)
    def checked(text: str) -> Any:
        try:
            return kind(text)
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            if text is not value:
                raise
            raise argparse.ArgumentTypeError(f"{error} (from the variable {name})") from error

    return checked


def _truth(value: str) -> bool:
    """The value of a flag that is given as a variable."""
    if value.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(TRUTHS)}")
    return TRUTHS[value.lower()]


def _one_of(choices: list[str]) -> Callable[[str], str]:
    """A type that checks ``choices``: argparse applies types to defaults too, unlike its own ``choices``."""

    def checked(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return value

    return checked


def _add_http(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen on; 0: any that is free (default: 8000)"
    )
    group.add_argument("--api-key", metavar="KEY", help="key that all requests but /health must carry (default: none)")
    group.add_argument(
        "--allowed-hosts",
        metavar="NAME,...",
        default="",
        help="host names that requests may address; others are refused (default: any)",
    )
    group.add_argument("--served-model-name", metavar="NAME", help="the model's name in requests (default: MODEL)")
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests get after SIGTERM (default: 30)",
    )
    group.add_argument(
        "--ping-interval",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds of silence after which a stream gets a comment (default: 10)",
    )


def _add_service(parser: argparse.ArgumentParser) -> None:
    known, defaults = get_type_hints(ServiceSettings), ServiceSettings()
    group = parser.add_argument_group("service")
    group.add_argument(
        "--max-batch",
        type=int,
        default=defaults.max_batch,
        metavar="N",
        help=f"most requests that run at once (default: {defaults.max_batch})",
    )
    group.add_argument(
        "--max-waiting",
        type=int,
        default=defaults.max_waiting,
        metavar="N",
        help=f"further requests that may wait (default: {defaults.max_waiting})",
    )
    for name, text in (
        ("admission", "late: a request that would miss its objectives is served late; strict: refused at once"),
        ("scheduler", "slo: whoever has least time left for an objective starts next; fcfs: whoever came first"),
    ):
        default = getattr(defaults, name)
        help_text = f"{text} (default: {default})"
        group.add_argument(f"--{name}", choices=get_args(known[name]), default=default, help=help_text)
    group.add_argument("--slo-ttft-ms", type=float, metavar="MS", help="objective for the first token")
    group.add_argument("--slo-tpot-ms", type=float, metavar="MS", help="objective for each later token")


def _service_settings(args: argparse.Namespace) -> ServiceSettings:
    return ServiceSettings(
        max_batch=args.max_batch,
        max_waiting=args.max_waiting,
        admission=args.admission,
        scheduler=args.scheduler,
        objectives=_objectives(args.slo_ttft_ms, args.slo_tpot_ms),
    )


def _objectives(ttft_ms: float | None, tpot_ms: float | None) -> Objectives:
    for limit in (ttft_ms, tpot_ms):
        if limit is not None and not 0 < limit < math.inf:
            raise ConfigError(f"an objective is {limit} ms, but must be more than 0, and finite")
    return Objectives.of_ms(ttft_ms, tpot_ms)


def _load(name: str, wanted: dict[str, Any], settings: ServiceSettings) -> AsyncEngine:
    return AsyncEngine(MoEModel.from_pretrained(name, **wanted), settings=settings)


def _say_ready(url: str) -> None:
    print(f"duoserve: serving on {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
