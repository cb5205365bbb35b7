"""Ten thousand requests of random shape at a server, some given up and some wrong: what each gets, and what is left.

    python bench/bench_soak.py [--requests 10000] [--json OUT] [--quick]

The server is duoserve's own, in a process of its own, with ``invariant=True``, a quarter of the experts in slots and
the others on the disk. Clients keep it full: there are four for each place in its batch. One request in twenty is given
up, one in a hundred is malformed, in many ways; the others are whole or streamed, greedy or with a seed, with stop
strings, several choices, log-probabilities and objectives. What comes is held against the texts that the library makes
of each prompt alone, before the server is started. Exit code 1 when any check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duoserve import MoEModel
from harness import as_module, module_env, result_file, write_result
from machine import conditions, foreign_cpu
from soak import report as soak_report
from soak.clients import Clients, http_client, soak
from soak.load import Kind, kinds, requests
from soak.watch import Sample, growth, look, looking, watch

PLAY = Path(__file__).resolve().parents[1] / "tests" / "macbeth.txt"
MODEL, BATCH = "bard", 16
SEED = 0
KEPT_SAMPLES = 60
Texts = list[list[tuple[str, str]]]


def alone(found: Sequence[Kind], loading: dict[str, Any]) -> Texts:
    """Text and finish reason of each choice of each kind, made one at a time."""
    with MoEModel.from_pretrained(MODEL, **loading) as model:
        done = [[model.generate(kind.prompt, kind.params(repeat)) for repeat in range(kind.n)] for kind in found]
    return [[(one.text, str(one.finish_reason)) for one in choices] for choices in done]


@contextmanager
def server(loading: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    wanted = {"model": MODEL, "loading": loading, "settings": {"max_batch": BATCH}}
    command = [sys.executable, *as_module("soak.server", json.dumps(wanted))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=module_env(), text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


async def load(process: subprocess.Popen[str], url: str, args: argparse.Namespace, expected: Texts) -> dict[str, Any]:
    """The soak itself, and the server's own word on it."""
    samples: list[Sample] = []
    asked = requests(args.requests, args.kinds, SEED)
    async with http_client(url) as http:
        clients = Clients(http, args.found, expected, SEED)
        tally = clients.tally
        clients.one_has_ended = looking(process.pid, args.requests, tally.ended.total, samples)
        watching = asyncio.create_task(watch(process.pid, http, tally.ended.total, samples, tally.fault))
        began = time.perf_counter()
        await soak(clients, asked, args.at_once)
        seconds = time.perf_counter() - began
        watching.cancel()
        service = await at_rest(http)
    samples.append(look(process.pid, tally.ended.total()))
    return {
        "load_seconds": seconds,
        "asked": args.requests,
        "tally": tally.to_dict(),
        "service": service,
        "memory": growth(samples),
        "samples": [asdict(one) for one in samples[:: 1 + len(samples) // KEPT_SAMPLES]],
    }


async def at_rest(http: Any) -> dict[str, Any]:
    """The service's figures once nothing runs any more, or after ten seconds as they are; its health with them."""
    for _ in range(100):
        service = (await http.get("/status")).json()["service"]
        if service["running"] + service["waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    return service | {"health": (await http.get("/health")).status_code}


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """How the process ends when it is told to."""
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    said = [json.loads(line) for line in out.splitlines()]
    return {
        "exit_code": process.returncode,
        "stderr": err[-2000:],
        "integrity": said[-1]["integrity"] if said else None,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    began, busy_before = time.perf_counter(), foreign_cpu(1.0)
    result = conditions("bench_soak", args.quick)
    args.found = kinds(PLAY.read_text(), args.kinds, SEED)
    with tempfile.TemporaryDirectory() as folder:
        loading = {"expert_slots": "25%", "invariant": True, "cache_dir": folder, "max_context": 16_384}
        expected = alone(args.found, loading)
        with server(loading) as (process, url):
            result |= asyncio.run(load(process, url, args, expected)) | {"end": ended(process)}
    result |= {"model": MODEL, "batch": BATCH, "at_once": args.at_once, "kinds": args.kinds}
    result["idle"] = {"foreign_cpu_before": busy_before, "foreign_cpu_after": foreign_cpu(1.0)}
    return result | {"checks": soak_report.checks(result), "seconds": time.perf_counter() - began}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="in all (default: 10000)")
    parser.add_argument("--kinds", type=int, default=300, help="different prompts (default: 300)")
    parser.add_argument("--at-once", type=int, default=4 * BATCH, help=f"clients (default: {4 * BATCH})")
    parser.add_argument("--quick", action="store_true", help="few requests: a check of the bench")
    parser.add_argument("--json", type=result_file, help="write everything to this file")
    return parser.parse_args()


def main() -> int:
    """0, or 1 when a check failed."""
    args = arguments()
    if args.quick:
        args.requests, args.kinds = min(args.requests, 200), min(args.kinds, 20)
    result = run(args)
    print(soak_report.render(result))
    if args.json is not None:
        write_result(args.json, result)
    return 0 if all(check["passed"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
