"""A result of ``bench_serve`` as Markdown: ``PYTHONPATH=bench python -m serve.report RESULT.json [--short]``.

``--short`` leaves out the parts, the targets and what was not measured. ``--timeline OUT.json.gz`` writes the
timeline of decode steps that the result holds as a file for Perfetto (https://ui.perfetto.dev), and prints no report.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables
from duoserve.metrics import percentile
from serve.cells import AUTO, GRAPH, Cell
from serve.models import BF16
from serve.timeline import write
from tables import table

Result = dict[str, Any]
Part = dict[str, Any]

NOT_MEASURED = "not measured"


def render(result: Result, short: bool = False) -> str:
    """The whole report."""
    sections = [warnings(result), _conditions(result), ceilings(result), rows(result), peers(result)]
    whole = [parts_off, targets, checks, timeline, missing]
    sections += [section(result) for section in ([checks] if short else whole)]
    return "\n\n".join(section for section in sections if section)


def warnings(result: Result) -> str:
    """Why figures are missing or worth nothing, first and in bold."""
    found = ["this is `--tiny` on a CPU: it checks the bench and measures nothing"] * result["quick"]
    failed = [part for part in result["parts"] if part["status"] in ("failed", "skipped")]
    found += [f"{part['name']}: {part['status']}: {part['why'].strip().splitlines()[-1]}" for part in failed]
    if result["arena"] and not result["quick"] and not result["arena"]["arena_pinned"]:
        found.append("the experts' memory could not be page-locked")
    return tables.warnings(result, found)


def _conditions(result: Result) -> str:
    """Machine, versions, command, and how it was measured."""
    machine, gpu, arena = result["machine"], result["gpu"], result["arena"] or {}
    lines = (
        [f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, CUDA {gpu['cuda']}, driver {gpu['driver']}."]
        if gpu
        else []
    )
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_bytes'] / 2**30:.0f} GiB RAM, "
        f"Linux {machine['kernel']}.",
        tables.provenance(result),
        f"{'Tiny models' if result['quick'] else 'Models of real size'} with random weights and made-up routing that "
        f"has the statistics of real routing; the experts share {arena.get('arena_bytes', 0) / 2**30:.1f} GiB of "
        f"{'page-locked ' if arena.get('arena_pinned') else ''}host memory. Each row is one request after another that "
        "warmed up, with other routing; TPOT is the gap between a sequence's tokens. `x` is over the bound.",
    ]
    lines += [
        f"Guesses come from a {name} predictor whatever the policy would choose: it was trained on other made-up "
        "requests, and the scores that it reads are the tape's."
        for name in sorted({part["measured"]["guesses"] for part in _measured(result)} - {""})
    ]
    return "\n".join(f"- {line}" for line in lines)


def ceilings(result: Result) -> str:
    """The rates of the same run."""
    found = result["ceilings"]
    if not found:
        return ""
    lines = [
        ("pinned host memory to device", f"{found['link_bytes_per_s'] / 1e9:.1f} GB/s"),
        ("copy in device memory, read + written", f"{found['memory_bytes_per_s'] / 1e9:.0f} GB/s"),
        ("large bf16 product", f"{found['flop_per_s'] / 1e12:.1f} TFLOP/s"),
    ]
    return table(["ceiling", "this run"], lines)


def rows(result: Result) -> str:
    """A table a model, a line a cell that is not about a part."""
    models = list(dict.fromkeys(part["model"] for part in _cells(result)))
    return "\n\n".join(_model_rows(result, model) for model in models)


def _model_rows(result: Result, model: str) -> str:
    head = [
        model,
        "guesses",
        "mode",
        "slots",
        "prompt",
        "TTFT s",
        "TPOT ms p50 / p95",
        "tok/s",
        "hits",
        "misses a step",
    ]
    head += ["GB/s (of the link)", "stall, prefill / decode", "not needed, prefill", "host us a step"]
    head += ["peak GB (plan)", "J a token"]
    mine = [part for part in _cells(result) if part["model"] == model and not Cell(**part["cell"]).without]
    return table(head, [_line(part) for part in mine])


def _line(part: Part) -> Sequence[str]:
    cell = Cell(**part["cell"])
    name, size = f"{cell.policy} {cell.format}", (cell.share, f"{cell.prompt} x {cell.batch}")
    if part["status"] != "measured":
        return [name, "", cell.mode, *size, f"{NOT_MEASURED}: {_brief(part['why'])}", *[""] * 10]
    row, measured = part["row"], part["measured"]
    mode = measured["launch"] if cell.mode == AUTO else cell.mode
    known = [name, measured["guesses"] or "-", mode, cell.share, f"{measured['prompt']} x {measured['batch']}"]
    ttft = f"{row['ttft_s']:.3g} ({_times(row['ttft_s'], row['ttft_bound_s'])})"
    tpot = f"{1e3 * row['tpot_p50_s']:.3g} / {1e3 * row['tpot_p95_s']:.3g}"
    peak = f"{row['peak_bytes'] / 1e9:.2f} " if row["peak_bytes"] is not None else f"{NOT_MEASURED} "
    return [
        *known,
        ttft,
        f"{tpot} ({_times(row['tpot_mean_s'], row['tpot_bound_s'])})",
        f"{row['tok_s']:.4g}",
        "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}",
        f"{row['misses_per_step']:.1f}",
        f"{row['decode_bytes_per_s'] / 1e9:.2f} ({row['decode_link_share']:.0%})",
        # A step that is one graph waits for the link inside its kernels, where nobody takes the time.
        f"{row['prefill_stall_share']:.0%} / {'-' if mode == GRAPH else format(row['decode_stall_share'], '.0%')}",
        f"{row['prefill_unneeded_share']:.0%}",
        "-" if row["host_s_per_step"] is None else f"{1e6 * row['host_s_per_step']:.0f}",
        f"{peak}({row['planned_bytes'] / 1e9:.2f})",
        NOT_MEASURED if row["joules_per_token"] is None else f"{row['joules_per_token']:.2f}",
    ]


def peers(result: Result) -> str:
    """What transformers with accelerate's offloading took."""
    lines = []
    for part in (part for part in result["parts"] if "cell" not in part):
        if part["status"] == "measured":
            found = part["measured"]
            gaps = found["itl_s"]
            tpot = f"{1e3 * percentile(gaps, 50):.3g}" if gaps else NOT_MEASURED
            peak = NOT_MEASURED if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.2f}"
            lines.append([part["model"], f"{found['ttft_s']:.3g}", tpot, f"{found['moved_bytes'] / 1e9:.1f}", peak])
        else:
            lines.append([part["model"], f"{NOT_MEASURED}: {_brief(part['why'])}", "", "", ""])
    head = ["transformers + accelerate, 128 tokens", "TTFT s", "TPOT ms", "GB moved a pass", "peak GB"]
    return table(head, lines) if lines else ""


def parts_off(result: Result) -> str:
    """What each part is worth: the row without it over the row with all."""
    plain = {
        (part["model"], cell.policy, cell.share): part["row"]
        for part in _measured(result)
        if (cell := Cell(**part["cell"])).group[1:] == (128, 1) and cell.is_whole and cell.format == BF16
    }
    lines = []
    for part in _cells(result):
        cell = Cell(**part["cell"])
        base = plain.get((cell.model, cell.policy, cell.share))
        if cell.without and part["status"] == "measured" and base:
            row = part["row"]
            times = (_times(row["ttft_s"], base["ttft_s"]), _times(row["tpot_mean_s"], base["tpot_mean_s"]))
            lines.append([cell.model, f"{cell.policy} {cell.share}", cell.without, *times])
        elif cell.without:
            lines.append([cell.model, f"{cell.policy} {cell.share}", cell.without, NOT_MEASURED, NOT_MEASURED])
    return table(["switched off", "of", "part", "TTFT", "TPOT"], lines) if lines else ""


def targets(result: Result) -> str:
    """The verdicts, good and bad alike."""
    lines = [(t["name"], t["asked"], t["verdict"], t["detail"]) for t in result["targets"]]
    return table(["target", "asked", "verdict", ""], lines) if lines else ""


def checks(result: Result) -> str:
    """The correctness of what was timed."""
    words = {True: "passed", False: "**FAILED**", None: "not checked"}
    lines = [(c["name"], words[c["passed"]], c["detail"]) for c in result["checks"]]
    return table(["correctness, in the same run", "", ""], lines) if lines else ""


def timeline(result: Result) -> str:
    """Which steps there is a timeline of."""
    found = result["timeline"]
    if found is None:
        return ""
    if found["status"] != "measured":
        return f"- Timeline {NOT_MEASURED} ({found['name']}): {_brief(found['why'])}"
    return f"- Timeline of a step of each ({found['events']} events; see `--timeline`): {found['name']}."


def missing(result: Result) -> str:
    """What was not measured, by reason."""
    reasons: dict[str, list[str]] = {}
    for part in result["parts"]:
        if part["status"] != "measured":
            reasons.setdefault(part["why"].strip().splitlines()[-1], []).append(part["name"])
    return "\n".join(f"- Not measured ({len(names)}): {why}: {'; '.join(names)}." for why, names in reasons.items())


def _cells(result: Result) -> list[Part]:
    return [part for part in result["parts"] if "cell" in part]


def _measured(result: Result) -> list[Part]:
    return [part for part in _cells(result) if part["status"] == "measured"]


def _brief(why: str) -> str:
    last = why.strip().splitlines()[-1]
    return last if len(last) <= 60 else f"{last[:57]}..."


def _times(value: float, over: float) -> str:
    return f"{value / over:.2f}x" if over else "-"


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what bench_serve.py --json wrote")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--timeline", type=Path, metavar="OUT.json.gz")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    if args.timeline is None:
        print(render(result, args.short))
    elif (result["timeline"] or {}).get("status") == "measured":
        write(result["timeline"]["trace"], args.timeline)
    else:
        parser.error("the result holds no timeline")


if __name__ == "__main__":
    main()
