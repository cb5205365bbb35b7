"""The planner against what was measured and published: ``python bench/bench_plan.py --out bench/results/plan-DATE.md``.

Nothing is run but the planner. Measured rows are those of the CPU bench in bench/results, its own ceilings the machine
that is planned for; published rows are those of the papers that say enough of their conditions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from duoserve.models.described import CONFIG, DescribedModel
from duoserve.models.registry import family_of
from duoserve.planning.model_cards import find_model
from duoserve.planning.planner import Plan, Planner
from duoserve.planning.policy_speed import Question
from duoserve.planning.routing_curves import curves_for
from duoserve.planning.speed import PromptSpec, StepSpec
from duoserve.replaying.hardware import GIB, Hardware, find_hardware
from duoserve.scheduling.policies import get_policy
from tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
WITHIN = 0.30
DISK_POLICIES = ("lru", "on-demand", "layer-prefetch")
FREETOKEN_FIXED_S, FREETOKEN_MISS_S = 5.44e-3, 0.194e-3  # what it says a token costs, and each miss
HALF_RATE = "the products of a whole prompt reach half of their ceiling, by the same file"
CONTEXT = 640  # tokens before one that is decoded, where nobody says how many
CPU_LATENCY_S = 1e-4  # of a read; nothing beside the milliseconds that an expert takes


@dataclass(frozen=True)
class Row:
    """A figure of others or of a bench, and the planner's. ``why`` says what is behind an error beyond WITHIN."""

    what: str
    unit: str
    known: float | None
    planned: float | None
    why: str = ""

    @property
    def cells(self) -> list[str]:
        """As a line of the table."""
        if self.known is None or self.planned is None:
            numbers = [_number(self.known), _number(self.planned), "-"]
            return [self.what, self.unit, *numbers, self.why]
        error = self.planned / self.known - 1
        verdict = "within 30 %" if abs(error) <= WITHIN else self.why
        return [self.what, self.unit, _number(self.known), _number(self.planned), f"{error:+.0%}", verdict]


def main() -> None:
    """Prints the tables, and writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", type=Path, default=RESULTS / "cpu-epyc-2026-11-23.json", help="of the CPU bench")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = report(json.loads(args.cpu.read_text()), args.cpu.name)
    print(text)
    if args.out is not None:
        args.out.write_text(text)


def report(result: dict[str, Any], name: str) -> str:
    """Both tables in Markdown."""
    heading = ["", "unit", "known", "planned", "error", "verdict"]
    measured = markdown([heading, *(row.cells for row in measured_rows(result))])
    published = markdown([heading, *(row.cells for row in published_rows())])
    threads = copy_threads(result)
    planned = "an expert" if threads == 1 else f"{threads} experts"
    seen = seen_too_many(result)
    overhead = f"{1e3 * cpu_machine(result).layer_overhead_s:.2f} ms"
    return f"""# The planner, checked

`python bench/bench_plan.py --cpu bench/results/{name}`: nothing is run but the planner.

## Measured on a CPU

Medians of `{name}`, whose ceilings are the machine: reads by as many threads as copied
(`copy_threads={threads}`), one-row products in bfloat16, float32 products of 128 rows. Two things are no predictions:
what a layer costs beyond these, {overhead}, is taken from the resident decode; and that layer-prefetch reads {planned}
too many in each layer of a step, one for each copy thread, was seen in results ({seen:.1f} in this one).
Random weights route like no card: the hit rate and the prompt's misses are the measured ones, but in the last two rows,
which go by the nearest card (Mixtral-8x7B).

{measured}

## Published

Machines are those of duoserve/replaying/hardware.py. The formulas are duoserve's own schedule, not that of the systems
below. Nothing on a GPU has been measured by this project yet.

{published}
"""


def copy_threads(result: dict[str, Any]) -> int:
    """Threads that read experts in this result; those that do not say it had 2."""
    return int(result.get("copy_threads", 2))


def seen_too_many(result: dict[str, Any]) -> float:
    """Experts that layer-prefetch read in each layer of a step beyond those that were asked for."""
    asked, read = (
        result["summary"][f"duoserve {name}"]["decode_read_mb_per_token"]["median"]
        for name in ("on-demand", "layer-prefetch")
    )
    return float((read / asked - 1) * result["shape"]["top_k"])


def cpu_machine(result: dict[str, Any]) -> Hardware:
    """The machine of a CPU bench by its ceilings; the overhead of a layer is what the resident decode leaves over."""
    ceilings = result["ceilings"]
    memory = ceilings["gemv_bytes_per_s"]["bfloat16"]
    bare = Hardware(
        "cpu",
        link=ceilings["memory_bytes_per_s"] / 2,
        memory=memory,
        flops=max(ceilings["matmul_flop_per_s"].values()),
        copy_latency_s=CPU_LATENCY_S,
        layer_overhead_s=0.0,
        host_computes=True,
        memory_bytes=result["machine"]["ram_bytes"],
        host_bytes=0,
        disk=ceilings["disk_bytes_per_s"][str(copy_threads(result))],
        reader=ceilings["disk_bytes_per_s"]["1"],
    )
    plan = _planner(result).plan(bare, _question(result, "100%"))
    left_s = result["summary"]["duoserve resident"]["tpot_s"]["median"] - plan.best.tpot.total
    return replace(bare, layer_overhead_s=left_s / result["shape"]["layers"])


def measured_rows(result: dict[str, Any]) -> Iterator[Row]:
    """TTFT and TPOT of each policy."""
    hardware, planner = cpu_machine(result), _planner(result)
    resident = planner.plan(hardware, _question(result, "100%")).best
    known = result["summary"]["duoserve resident"]
    yield Row(
        "resident, TTFT",
        "s",
        known["ttft_s"]["median"],
        resident.ttft.total,
        HALF_RATE,
    )
    yield Row("resident, TPOT", "ms", 1e3 * known["tpot_s"]["median"], 1e3 * resident.tpot.total)
    plan = planner.plan(hardware, _question(result, "25%"))
    for policy in DISK_POLICIES:
        yield from _disk_rows(result, plan, policy)
    lru = plan.speeds["lru"]
    known = result["summary"]["duoserve lru"]
    yield Row("lru, TTFT, by the card", "s", known["ttft_s"]["median"], lru.ttft.total)
    why = f"the card's hits are {lru.hit_rate:.0%}, random weights' {known['decode_hit_rate']:.0%}"
    yield Row("lru, TPOT, by the card", "ms", 1e3 * known["tpot_s"]["median"], 1e3 * lru.tpot.total, why)


def _disk_rows(result: dict[str, Any], plan: Plan, name: str) -> Iterator[Row]:
    """A policy with its own hits; of a prompt, with the experts that it really read."""
    policy, known, shape = get_policy(name), result["summary"][f"duoserve {name}"], result["shape"]
    costs = _planner(result).costs(plan)
    total = shape["layers"] * shape["experts"]
    read = 1e6 * known["prefill_read_mb"]["median"] / plan.memory.slot_bytes
    prompt = PromptSpec(shape["prompt_tokens"], 1, shape["experts"], resident=1 - read / total)
    step = StepSpec(1, shape["prompt_tokens"] + shape["new_tokens"] // 2, shape["top_k"], known["decode_hit_rate"])
    ttft, tpot = costs.prefill(policy, prompt).total, costs.decode(policy, step).total
    ttft_s, tpot_s, disk = known["ttft_s"]["median"], known["tpot_s"]["median"], plan.hardware.disk
    whole_mb, token_mb = known["prefill_read_mb"]["median"], known["decode_read_mb_per_token"]["median"]
    yield Row(f"{name}, TTFT", "s", ttft_s, ttft, _faster_disk(whole_mb, ttft_s, disk))
    yield Row(f"{name}, TPOT", "ms", 1e3 * tpot_s, 1e3 * tpot, _faster_disk(token_mb, tpot_s, disk))


def _faster_disk(read_mb: float, seconds: float, disk: float) -> str:
    """What is to be said of a run that read faster than the ceiling's probe, its computation counted as reading."""
    rate = 1e6 * read_mb / seconds
    return f"it read at least {rate / 1e9:.2f} GB/s, the probe {disk / 1e9:.2f}" if rate > disk else ""


def _planner(result: dict[str, Any]) -> Planner:
    shape = result["shape"]
    raw = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "num_local_experts": shape["experts"],
        "num_experts_per_tok": shape["top_k"],
        "max_position_embeddings": 4096,
    }
    family = family_of(raw)
    model = DescribedModel(Path(), family, family.parse_config(raw), {}, CONFIG)
    return Planner("random", model, copy_threads=copy_threads(result))


def _question(result: dict[str, Any], slots: str) -> Question:
    shape = result["shape"]
    return Question(prompt=shape["prompt_tokens"], new_tokens=shape["new_tokens"], expert_slots=slots)


def published_rows() -> Iterator[Row]:
    """Those of FreeToken, SeqMoE, MoE-Infinity, DuoServe and stream loading."""
    yield from freetoken()
    yield from seqmoe()
    yield from moe_infinity()
    yield from duoserve_paper()
    yield Row(
        "stream loading, DeepSeek-671B int4, RTX 5090: prefill", "tok/s", 1200, None, "the prompt's length is not given"
    )


def freetoken() -> Iterator[Row]:
    """Qwen3-30B-A3B in bf16 on an RTX 5090 whose link carries 46.7 GB/s: tokens/s by share of the experts."""
    hardware = replace(find_hardware("rtx5090"), link=46.7e9, memory_bytes=128 * GIB, host_bytes=128 * GIB)
    planner, asked = Planner("qwen3-30b-a3b", find_model("qwen3-30b-a3b")), 48 * 8
    for slots, known in (("12.5%", 26.5), ("25%", 43.9), ("43.75%", 94.1)):
        plan = planner.plan(hardware, Question(expert_slots=slots))
        hits, theirs = plan.best.hit_rate, 1 - (1 / known - FREETOKEN_FIXED_S) / FREETOKEN_MISS_S / asked
        what = f"FreeToken, Qwen3-30B bf16, RTX 5090, {slots} of the experts"
        why = f"hits: {hits:.0%} planned; by its cost of a miss, it had {theirs:.0%}"
        yield Row(what, "tok/s", known, 1 / plan.best.tpot.total, why)
        step = StepSpec(1, CONTEXT, 8, theirs)
        found = planner.costs(plan).decode(get_policy("duoserve"), step)
        yield Row(f"the same, with {theirs:.0%} hits", "tok/s", known, 1 / found.total)
    costs = planner.costs(plan)
    yield Row("the same, a miss", "ms", 1e3 * FREETOKEN_MISS_S, 1e3 * costs.copy_s)
    fixed = costs.decode(get_policy("resident"), StepSpec(1, CONTEXT, 8, 1.0)).total
    yield Row("the same, a token without misses", "ms", 1e3 * FREETOKEN_FIXED_S, 1e3 * fixed)


def seqmoe() -> Iterator[Row]:
    """Qwen3-30B-A3B in FP8 on an RTX 4090."""
    hardware = replace(find_hardware("rtx4090"), memory_bytes=48 * GIB)
    for slots, known in (("45%", 104.1), ("100%", 122.7)):
        plan = _published("qwen3-30b-a3b", hardware, Question(form="fp8", expert_slots=slots))
        why = "its kernels and launches take more than the peak rates and 50 us a layer"
        yield Row(
            f"SeqMoE, Qwen3-30B FP8, RTX 4090, {slots} of the experts", "tok/s", known, 1 / plan.best.tpot.total, why
        )
    curves = curves_for(128, 8, "qwen3-30b-a3b")
    for share, known in ((0.15, 60.0), (0.25, 74.2), (0.35, 84.5), (0.45, 88.5)):
        rate = 100 * curves.hit_rate("lru", share)
        yield Row(f"SeqMoE, hits of LRU at {share:.0%}", "%", known, rate)


def moe_infinity() -> Iterator[Row]:
    """Its README, A5000 in fp16; how much memory its cache had is not said: all that duoserve would use is planned."""
    why = "the host's time in transformers and MoE-Infinity's dispatch is not modelled"
    for name, known in (("mixtral-8x7b", 0.735), ("deepseek-v2-lite", 0.100), ("qwen3-30b-a3b", 0.150)):
        hardware = replace(find_hardware("a5000"), host_bytes=256 * GIB)
        plan = _published(name, hardware, Question())
        yield Row(
            f"MoE-Infinity, {name} 16 bits, A5000, its memory not known",
            "s/token",
            known,
            plan.speeds["lru"].tpot.total,
            why,
        )


def duoserve_paper() -> Iterator[Row]:
    """The paper gives upper bounds over all its models and devices, no figure at known conditions."""
    plan = _published("mixtral-8x7b", find_hardware("a5000"), Question(form="int4", prompt=128, expert_slots="15%"))
    ratio = plan.speeds["on-demand"].ttft.total / plan.speeds["duoserve"].first_ttft_s
    yield Row(
        "DuoServe, Mixtral int4, A5000: TTFT of on-demand over streaming",
        "x",
        None,
        ratio,
        "published: up to 5.34 over all models and devices; here both have the same kernels and copies",
    )


def _published(name: str, hardware: Hardware, question: Question) -> Plan:
    return Planner(name, find_model(name)).plan(hardware, question)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
