"""Replays against reality: TTFT and TPOT of every policy from a cold disk, beside a replay of the same routing.

    python bench/bench_reality.py --folder DIR --json bench/results/reality-NAME.json

serves the same requests with every policy and three numbers of slots, in turn, round by round; experts are read with
direct I/O. In the same rounds it measures the machine: raw reads, experts in slots, and requests with all experts in
slots. What the routers chose is then replayed with the same policy, slots and predictor, on one machine for each model,
none of whose figures comes from the runs that are predicted. ``bard`` continues a play; the other model is a Mixtral of
288 M random weights (random_mixtral.py). The report is written beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from duoserve.config import EngineConfig
from duoserve.predictors.training import train
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import get_policy
from duoserve.text.tokenizer import Tokenizer
from duoserve.traces.trace import Trace
from duoserve.tracing import RecordingSpec, record
from harness import result_file, write_result
from machine import ForeignCpu, conditions, foreign_cpu
from random_mixtral import ensure_checkpoint
from reality import report as reality_report
from reality.cells import Cell, Served, Setting
from reality.machine import Residents, machine, replayed, tpots
from reality.probe import Probe, Rates
from reality.timed_machine import TimedMachine
from shapes import SHAPES

REPOSITORY = Path(__file__).resolve().parent.parent
PLAY = REPOSITORY / "tests" / "macbeth.txt"
POLICIES = (*("on-demand", "layer-prefetch", "lru", "lookahead", "activation-matrix", "duoserve-paper", "duoserve"),)
SHARES = (0.25, 0.5, 0.75)
TRAINING = 6  # requests that predictors are trained on
COPY_THREADS = EngineConfig().copy_threads


@dataclass(frozen=True)
class Sizes:
    """How much is run: tokens of a prompt and behind it, rounds behind the first, shares of the experts in slots."""

    prompt: int
    new_tokens: int
    rounds: int
    shares: Sequence[float]
    policies: Sequence[str]


@dataclass(frozen=True)
class Subject:
    """A model that is loaded, and its trace: requests to measure with, and others to train on."""

    setting: Setting
    prompts: Sequence[list[int]]
    measured: Trace
    training: Trace


def prompts_of(model: str, count: int, length: int) -> list[list[int]]:
    """Passages of a play for ``bard``, else random tokens."""
    if model != "bard":
        random = torch.Generator().manual_seed(0)
        vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        return torch.randint(3, vocab, (count, length), generator=random).tolist()
    tokenizer = Tokenizer.load(REPOSITORY / "duoserve" / "assets" / "bard")
    assert tokenizer is not None
    ids = tokenizer.encode(PLAY.read_text())
    stride = (len(ids) - length) // count
    return [ids[start : start + length] for start in range(0, count * stride, stride)]


def subject(model: str, cache: Path, sizes: Sizes) -> Subject:
    """The requests, and what the routers choose in them."""
    count = sizes.rounds + 1
    prompts = prompts_of(model, count + TRAINING, sizes.prompt)
    context = -(-(sizes.prompt + sizes.new_tokens) // 64) * 64
    params = SamplingParams(max_tokens=sizes.new_tokens, temperature=0.0, ignore_eos=True)
    wanted = EngineConfig(device="cpu", max_context=context)
    out = cache / f"{Path(model).name}-trace.safetensors"
    out.unlink(missing_ok=True)
    trace = record(model, prompts, RecordingSpec(out, params), wanted, "resident")
    measured, training = trace.select(range(count)), trace.select(range(count, len(prompts)))
    return Subject(Setting(model, cache, context, COPY_THREADS), prompts[:count], measured, training)


def measure(model: str, cache: Path, sizes: Sizes) -> dict[str, Any]:
    """All of one model: its cells, its machine, and both in figures."""
    about, foreign = subject(model, cache, sizes), ForeignCpu()
    kinds = {get_policy(name).predictor for name in sizes.policies}
    predictors = {kind: train(about.training, kind)[0] for kind in sorted(filter(None, kinds))}
    total = about.measured.meta.num_experts * len(about.measured.meta.layers)
    with ExitStack() as resources:
        probe = Probe(model, cache, COPY_THREADS, resources)
        residents = Residents.load(about.setting, probe, total, resources)
        kind_of = {name: get_policy(name).predictor or "" for name in sizes.policies}
        cells = [
            Cell(about.setting, name, int(share * total), resources, predictor=predictors.get(kind_of[name]))
            for share in sizes.shares
            for name in sizes.policies
        ]
        with foreign.measure():
            for number, prompt in enumerate(about.prompts):
                one_round(probe, residents, cells, prompt, sizes)
                if number == 0:
                    probe.rates = Rates()
        here = machine(probe, about.measured, COPY_THREADS)
        rows = [row(probe, about, here, cell) for cell in cells]
        checks = checks_of(model, probe, cells, residents.plain.served, about.measured)
    return {
        "model": Path(model).name,
        "prompt_tokens": sizes.prompt,
        "new_tokens": sizes.new_tokens,
        "experts": total,
        "expert_bytes": probe.layout.slot_bytes,
        "rates": probe.rates.figures,
        "machine": asdict(here),
        "resident": seconds_of(residents.plain.served[1:]),
        "cells": rows,
        "checks": checks,
        "foreign_cpu": foreign.share,
    }


def one_round(probe: Probe, residents: Residents, cells: Sequence[Cell], prompt: list[int], sizes: Sizes) -> None:
    """A request to every cell; the machine is measured before them, and its common pace in between."""
    probe.experts(max(1, sizes.prompt // 4))
    probe.listening(sizes.prompt)
    probe.reads()
    residents.note(probe.rates, prompt, sizes.new_tokens)
    for at, cell in enumerate(cells):
        if at % len(sizes.policies) == len(sizes.policies) // 2:
            residents.again(probe.rates, prompt, sizes.new_tokens)
            probe.reads()
        cell.served.append(cell.serve(prompt, sizes.new_tokens))


def seconds_of(served: Sequence[Served]) -> dict[str, list[float]]:
    """By request."""
    return {"ttft_s": [one.ttft_s for one in served], "tpot_s": [one.tpot_s for one in served]}


def row(probe: Probe, about: Subject, here: TimedMachine, cell: Cell) -> dict[str, Any]:
    """A policy with its slots, measured and replayed; the first request, which fills the slots, is left out."""
    done = replayed(probe, about.measured, here, cell.policy, cell.slots, cell.predictor)
    measured = seconds_of(cell.served[1:])
    told = {"ttft_s": done.ttft_s[1:], "tpot_s": tpots(done)[1:]}
    hits, misses = (sum(one.stats[f"{what}_decode"] for one in cell.served) for what in ("hits", "misses"))
    return {
        "policy": cell.policy,
        "slots": cell.slots,
        "predictor": None if cell.predictor is None else cell.predictor.name,
        "measured": measured,
        "replayed": told,
        "errors": {key: statistics.median(told[key]) / statistics.median(measured[key]) - 1 for key in measured},
        "hit_rates": {"measured": hits / (hits + misses), "replayed": done.hit_rate},
        "bytes": {"measured": sum(one.stats["bytes_total"] for one in cell.served)},
    }


def checks_of(
    model: str, probe: Probe, cells: Sequence[Cell], plain: Sequence[Served], trace: Trace
) -> list[dict[str, Any]]:
    """That the runs computed what the resident one does, which is what was traced, and read from the disk."""
    name = Path(model).name
    tokens = [one.token_ids for one in plain]
    fed = [request.token_ids_T[request.num_prompt :].tolist() for request in trace]
    equal = sum([one.token_ids for one in cell.served] == tokens for cell in cells)
    passed = {
        f"the resident run's tokens in {equal} of {len(cells)} cells": equal == len(cells),
        "the trace is of these requests": fed == [ids[:-1] for ids in tokens],
        "reads go past the page cache": probe.store.direct,
    }
    return [{"name": f"{name}: {what}", "passed": outcome} for what, outcome in passed.items()]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    began, busy_before = time.perf_counter(), foreign_cpu(1.0)
    torch.set_num_threads(args.threads)
    result = conditions("bench_reality", args.quick)
    result |= {"threads": args.threads, "copy_threads": COPY_THREADS, "rounds": args.rounds}
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        cache = Path(scratch)
        result["models"] = [measure(model, cache, sizes_of(model, args)) for model in models_of(args, cache)]
    result["checks"] = [check for model in result["models"] for check in model["checks"]]
    result["targets"] = reality_report.targets(result["models"])
    result["idle"] = {"foreign_cpu_before": busy_before, "foreign_cpu_after": foreign_cpu(1.0)}
    return result | {"seconds": time.perf_counter() - began}


def models_of(args: argparse.Namespace, cache: Path) -> list[str]:
    """Names or folders; the random one is made where it is not there yet."""
    folder = (args.folder or cache) / ("mixtral-tiny" if args.quick else "mixtral-288m")
    ensure_checkpoint(SHAPES["quick" if args.quick else "full"], folder)
    known: Mapping[str, str] = {"bard": "bard", "mixtral": str(folder)}
    return [known[name] for name in args.models.split(",")]


def sizes_of(model: str, args: argparse.Namespace) -> Sizes:
    """What is run of a model."""
    if args.quick:
        return Sizes(16, 4, 1, SHARES[1:2], ("on-demand", "lru", "duoserve"))
    return Sizes(128, 24 if model == "bard" else 12, args.rounds, SHARES, POLICIES)


def main() -> int:
    """0, or 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bard,mixtral", help="which of them (default: bard,mixtral)")
    parser.add_argument("--folder", type=Path, help="for the checkpoint and packs (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5, help="behind the one that fills the slots (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="that compute (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few cells: a check of the bench")
    parser.add_argument("--json", type=result_file, help="write everything to this file, and the report beside it")
    result = run(args := parser.parse_args())
    if args.folder is not None:
        result["command"] = result["command"].replace(str(args.folder), "DIR", 1)
    report = reality_report.render(result)
    print(report)
    if args.json is not None:
        write_result(args.json, result)
        args.json.with_suffix(".md").write_text(report + "\n")
    return 0 if all(check["passed"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
