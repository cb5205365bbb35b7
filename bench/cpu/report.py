"""A result file of ``bench_cpu`` as Markdown, for a terminal, for bench/results, and for the README.

    PYTHONPATH=bench python -m cpu.report RESULT.json [--readme README.md]

prints all of it; with ``--readme`` its main tables also go between the markers there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tables
from cpu.rows import OP_BY_OP, POLICIES, decode_io
from tables import into_readme, not_idle, spread, table

MARKERS = "<!-- bench_cpu -->", "<!-- /bench_cpu -->"

Result = dict[str, Any]


def render(result: Result) -> str:
    """The whole report."""
    parts = [warnings(result), _conditions(result), ceilings(result), speeds(result), ratios(result)]
    parts += [bounds(result), targets(result), checks(result)]
    return "\n\n".join(part for part in parts if part)


def headline(result: Result) -> str:
    """What the README shows: conditions, speeds and verdicts, and how the correctness checks went."""
    outcomes = [check["passed"] for check in result["checks"]]
    counts = f"{outcomes.count(True)} passed, {outcomes.count(False)} failed, {outcomes.count(None)} not checked"
    parts = [warnings(result), _conditions(result), speeds(result), targets(result)]
    return "\n\n".join(part for part in (*parts, f"Correctness checks in the same run: {counts}.") if part)


def warnings(result: Result) -> str:
    """Why these figures may not be worth quoting, in bold."""
    idle = result["idle"]
    busy = [idle["foreign_cpu_before"], idle["foreign_cpu_after"]]
    busy += [summary["foreign_cpu"] for summary in result["summary"].values()]
    found = ["this is `--quick`, a tiny model: it checks the bench and measures nothing"] * result["quick"]
    found += not_idle(max(busy))
    found += [f"{name} was not measured" for name in result["not_measured"]]
    if "xllamacpp" not in result["not_measured"] and "cap_bytes" in result and result["cap_bytes"] is None:
        found.append("llama.cpp was not measured from disk, as no control group can be made here")
    return tables.warnings(result, found)


def _conditions(result: Result) -> str:
    """Model, machine, versions and command."""
    shape, machine, disk = result["shape"], result["machine"], result["machine"]["disk"]
    overlap = result["routing_overlap"]
    routing = overlap and (
        f"; {overlap['distinct_tokens']} of {overlap['tokens']} decoded tokens are distinct; two in a row use "
        f"{overlap['mean_distinct_experts_of_2_tokens']:.2f} experts a layer (Mixtral-8x7B 3.26, even chance "
        f"{overlap['if_chosen_evenly']:.2f})"
    )
    rows = [
        f"Random Mixtral, bf16, H={shape['hidden']}, I={shape['intermediate']}, L={shape['layers']}, "
        f"E={shape['experts']}, K={shape['top_k']}, vocabulary {shape['vocab']}; "
        f"{shape['prompt_tokens']}-token prompt, {shape['new_tokens']} new tokens, greedy{routing or ''}.",
        f"{machine['cpu']} (family/model {machine['cpu_family_model']}), {machine['cores']} cores, "
        f"{result['threads']} threads, {', '.join(machine['isa']) or 'no listed ISA extension'}, "
        f"{machine['ram_bytes'] / 2**30:.0f} GiB RAM, Linux {machine['kernel']}; "
        f"{disk['filesystem']} on {disk['source']}, read-ahead {disk['read_ahead_kib']} KiB; "
        f"load {result['idle']['load'][0]:.2f}.",
        tables.provenance(result),
        "Each engine in a process of its own, rounds in turn, one warm-up round discarded; medians (extremes). "
        + ", ".join(f"`{name}={value}`" for name, value in result["worker_env"].items() if "HUB" not in name)
        + " for all.",
    ]
    if tokens := result.get("rehearsal_tokens"):
        rows.append(
            f"Before each measured request comes one for {tokens} tokens, discarded, for every engine: memory that "
            "lies idle while others take their turn is slow to come back under a hypervisor."
        )
    if threads := result.get("copy_threads"):
        op_by_op = ", ".join(f"`{name.removeprefix('duoserve ')}`" for name in OP_BY_OP)
        rows.append(
            f"duoserve reads experts with `copy_threads={threads}`; op by op run {op_by_op}, its others compiled."
        )
    if result.get("cap_bytes"):
        rows.append(
            f"llama.cpp's mapped file and duoserve from disk have {result['cap_bytes'] / 1e6:.0f} MB each in a control "
            "group, page cache included, beyond interpreter and libraries."
        )
    if "llama.cpp bf16" in result["summary"]:
        rows.append("llama.cpp is the wheel of xllamacpp, built for AVX2; weights are read into RAM where not mapped.")
    return "\n".join(f"- {row}" for row in rows)


def ceilings(result: Result) -> str:
    """What the machine did at most in the same run."""
    found = result["ceilings"]
    how = "O_DIRECT" if found["disk_direct"] else "buffered, cache dropped"
    disk = ", ".join(f"{rate / 1e9:.2f}" for rate in found["disk_bytes_per_s"].values())
    threads = "/".join(found["disk_bytes_per_s"])
    rows = [
        (f"disk read, {found['disk_piece_bytes'] / 1e6:.2f} MB pieces, {threads} threads, {how}", f"{disk} GB/s"),
        *_best_seen(result, "disk"),
        ("memory read", f"{found['memory_bytes_per_s'] / 1e9:.1f} GB/s"),
        *_best_seen(result, "memory"),
    ]
    for name, rate in found["matmul_flop_per_s"].items():
        rows.append((f"{name} product, {found['matmul_rows']} rows", f"{rate / 1e9:.0f} GFLOP/s"))
    for name, rate in found["gemv_bytes_per_s"].items():
        rows.append((f"{name} product, 1 row", f"{rate / 1e9:.1f} GB/s"))
    return table(["ceiling", "measured"], rows)


def _best_seen(result: Result, of: str) -> list[tuple[str, str]]:
    """The best rate of the whole run; older results have the probes alone."""
    best = result.get(f"{of}_best")
    return [(f"{of} read, the best seen: {best['by']}", f"{best['bytes_per_s'] / 1e9:.2f} GB/s")] if best else []


def speeds(result: Result) -> str:
    """A line an engine."""
    rows = []
    for name, figures in result["summary"].items():
        hits = figures["decode_hit_rate"]
        rows.append(
            (
                name,
                spread(figures["prefill_tok_s"], "{:.0f}"),
                spread(figures["ttft_s"], "{:.3g}"),
                spread(figures["decode_tok_s"], "{:.1f}"),
                spread(figures["prefill_read_mb"], "{:.0f}"),
                spread(figures["decode_read_mb_per_token"], "{:.1f}"),
                "" if hits is None else f"{hits:.0%}",
            )
        )
    head = ["engine", "prefill tok/s", "TTFT s", "decode tok/s", "MB read in prefill", "MB read a token", "hits"]
    return table(head, rows)


def ratios(result: Result) -> str:
    """Ours over theirs, by pairs of rounds."""
    rows = [
        (f"{r['ours']} / {r['theirs']}", spread(r["prefill"], "{:.2f}x"), spread(r["decode"], "{:.2f}x"))
        for r in result["ratios"]
    ]
    return table(["speed, in pairs", "prefill", "decode"], rows) if rows else ""


def bounds(result: Result) -> str:
    """How much of what the ceilings allow was reached."""
    found, summary = result["bounds"], result["summary"]
    asked = [
        ("resident prefill, FLOP / best product rate", "duoserve resident", "ttft_s", ["resident_prefill_s"]),
        ("resident decode, active bytes / best memory rate", "duoserve resident", "tpot_s", ["resident_decode_s"]),
        ("the same, compiled", "duoserve resident, compiled", "tpot_s", ["resident_decode_s"]),
        ("TTFT from disk, I/O or compute", "duoserve lru", "ttft_s", ["disk_prefill_io_s", "disk_prefill_compute_s"]),
        ("decode from disk, misses / disk rate", "duoserve lru", "tpot_s", ["disk_decode_io_s"]),
        ("decode from disk, compute", "duoserve lru", "tpot_s", ["disk_decode_compute_s"]),
        *((f"decode, bytes that it read: {name}", name, "tpot_s", [decode_io(name)]) for name in POLICIES),
    ]
    rows = []
    for what, name, figure, terms in asked:
        if name in summary and all(term in found for term in terms):
            bound, reached = max(found[term] for term in terms), summary[name][figure]["median"]
            rows.append((what, f"{1e3 * bound:.1f} ms", f"{1e3 * reached:.1f} ms", f"{bound / reached:.0%}"))
    return table(["bound", "allows", "measured", "reached"], rows) if rows else ""


def targets(result: Result) -> str:
    """The verdicts, good and bad alike."""
    rows = [(t["name"], t["asked"], t["verdict"], t["detail"]) for t in result["targets"]]
    return table(["target", "asked", "verdict", ""], rows)


def checks(result: Result) -> str:
    """The correctness of what was timed."""
    words = {True: "passed", False: "**FAILED**", None: "not checked"}
    rows = [(c["name"], words[c["passed"]], c["detail"]) for c in result["checks"]]
    return table(["correctness, in the same run", "", ""], rows)


def main() -> None:
    """Prints the report; with ``--readme`` also writes it there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what bench_cpu.py --json wrote")
    parser.add_argument("--readme", type=Path, help="put the report between this file's markers")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    print(render(result))
    if args.readme:
        args.readme.write_text(into_readme(args.readme.read_text(), headline(result), MARKERS))


if __name__ == "__main__":
    main()
