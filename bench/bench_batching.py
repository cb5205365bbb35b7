"""What sharing a pass over the experts is worth: tokens a second by batch size, and goodput by scheduler.

    python bench/bench_batching.py [--model bard|FOLDER] [--experts disk|resident] [--json OUT] [--quick]

Batches of 1 to 16 prompts decode together, with a quarter of the experts in slots and the others on the disk, or with
all in slots; batch sizes take turns, round by round. A step's bound is the time to read what it had to: missing experts
at the disk's rate, and every expert that it used and the dense weights once at the memory's. Then requests arrive at
random at a service, first come first served and by slack, with the same objectives for both; goodput is the highest
rate at which nine in ten meet them. With ``invariant=True`` the largest batch must give the tokens of each prompt
alone; how many do without it is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import batching_report
import torch
from batching_rates import decode_rounds, equal_tokens
from goodput import Arrivals, goodputs
from machine import conditions, foreign_cpu

from duoserve import MoEModel

REPOSITORY = Path(__file__).resolve().parent.parent
PLAY = REPOSITORY / "tests" / "macbeth.txt"
BATCHES = (1, 2, 4, 8, 12, 16)
PROMPT_TOKENS, NEW_TOKENS = 48, 48


def load(args: argparse.Namespace, cache: Path, *, invariant: bool = False) -> MoEModel:
    """The model as it is asked for; a quarter of the slots where experts come from the disk."""
    how: dict[str, Any] = {"policy": "resident"} if args.experts == "resident" else {"expert_slots": "25%"}
    if args.experts == "disk":
        how["policy"] = args.policy
    how |= {"max_context": 4096, "cache_dir": cache, "invariant": invariant}
    return MoEModel.from_pretrained(args.model, device="cpu", **how)


def prompts_of(model: MoEModel, count: int, length: int) -> list[list[int]]:
    """Passages of a play where the model has a tokenizer, random tokens where it has none."""
    if model.text is None:
        random = torch.Generator().manual_seed(0)
        return torch.randint(3, model.config.vocab_size, (count, length), generator=random).tolist()
    ids = model.encode(PLAY.read_text())
    stride = (len(ids) - length) // count
    return [ids[start : start + length] for start in range(0, count * stride, stride)]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    began, busy_before = time.perf_counter(), foreign_cpu(1.0)
    torch.set_num_threads(args.threads)
    result = conditions("bench_batching", args.quick)
    batches = BATCHES[:2] if args.quick else BATCHES
    new_tokens = 8 if args.quick else NEW_TOKENS
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(args.cache or folder)
        with load(args, cache) as model:
            prompts = prompts_of(model, max(batches), PROMPT_TOKENS)
            result |= {"model": Path(args.model).name, "experts": args.experts, "policy": model.policy}
            result |= {"slots": model.memory.num_slots, "total_experts": model.memory.total_experts}
            result |= {"prompt_tokens": PROMPT_TOKENS, "new_tokens": new_tokens, "threads": args.threads}
            result |= decode_rounds(model, prompts, batches, new_tokens, args.rounds, cache)
            result["prompts"] = len(prompts)
            result["equal_by_default"] = equal_tokens(model, prompts, new_tokens)
        with load(args, cache, invariant=True) as model:
            equal = equal_tokens(model, prompts, new_tokens)
        passed = equal == len(prompts)
        result["checks"] = [{"name": "invariant: tokens alone and in a batch", "passed": passed, "equal": equal}]
        arrivals = Arrivals.quick() if args.quick else Arrivals()
        result["goodput"] = goodputs(lambda: load(args, cache), prompts, arrivals)
    result["idle"] = {"foreign_cpu_before": busy_before, "foreign_cpu_after": foreign_cpu(1.0)}
    return result | {"targets": batching_report.targets(result), "seconds": time.perf_counter() - began}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bard", help="a folder or an embedded model (default: bard)")
    parser.add_argument("--experts", choices=("disk", "resident"), default="disk", help="where experts are")
    parser.add_argument("--policy", default="duoserve", help="with experts on the disk (default: duoserve)")
    parser.add_argument("--rounds", type=int, default=5, help="of each batch size (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="that compute (default: 2)")
    parser.add_argument("--cache", type=Path, help="where packed experts are (default: a folder of this run)")
    parser.add_argument("--quick", action="store_true", help="few steps: a check of the bench, no figures")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    return parser.parse_args()


def main() -> int:
    """0, or 1 when a batch changed a token though it was invariant."""
    args = arguments()
    if args.quick:
        args.rounds = 1
    result = run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(batching_report.render(result))
    return 0 if all(check["passed"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
