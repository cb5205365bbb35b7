"""The table and the plot that open the README, from a result of the CPU bench.

    python bench/opening.py RESULT.json [--readme README.md]

writes the plot beside the result, as SVG, and prints the table; ``--readme`` also puts it between the markers there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from cpu.report import warnings
from cpu.rows import BF12, BF12_EQUAL, BF12_POLICY, OURS_POLICY, decode_io
from tables import into_readme, spread, table

MARKERS = "<!-- opening -->", "<!-- /opening -->"
IN_RAM, QUARTER = "all in RAM", "a quarter in RAM, the others on disk"
EQUAL = "on disk, RAM as for a quarter"
TWICE = "all in RAM, twice the bytes"
CACHED = "on disk, and all in the page cache"
WIDTH, LABELS, BAR, GAP, TOP, END = 800, 370, 18, 8, 34, 50  # of the plot, in pixels
OURS, THEIRS = "#1f6f8b", "#b8b8b8"

Result = dict[str, Any]


class Row(NamedTuple):
    """An engine of the bench as the README calls it; ``bound``: what its decode is held against, None: nothing fits.

    ``in_table`` False: the plot shows it, but of the README's tables only the one of all engines.
    """

    name: str
    label: str
    experts: str
    bound: str | None
    in_table: bool = True


ROWS = (
    Row("duoserve resident", "duoserve, op by op", IN_RAM, "resident_decode_s"),
    Row("duoserve resident, compiled", "duoserve, compiled", IN_RAM, "resident_decode_s"),
    Row(BF12, "duoserve, compiled, experts in bf12", IN_RAM, None, in_table=False),
    Row("transformers grouped_mm", "transformers, `grouped_mm`", IN_RAM, "resident_decode_s"),
    Row("transformers eager", "transformers, `eager`", IN_RAM, "resident_decode_s", in_table=False),
    Row("llama.cpp bf16", "llama.cpp", IN_RAM, "resident_decode_s"),
    Row("duoserve resident int8", "duoserve, compiled, experts in int8", IN_RAM, None),
    Row("duoserve resident int4", "duoserve, compiled, experts in int4", IN_RAM, None, in_table=False),
    Row("llama.cpp q8_0", "llama.cpp, q8_0", IN_RAM, None),
    Row("llama.cpp q4_0", "llama.cpp, q4_0", IN_RAM, None, in_table=False),
    Row("transformers float32", "transformers, weights as float32", TWICE, None, in_table=False),
    Row("duoserve lru", "duoserve, op by op, `lru`", QUARTER, "disk_decode_io_s"),
    Row(OURS_POLICY, "duoserve, compiled, with a predictor", QUARTER, decode_io(OURS_POLICY)),
    Row(BF12_POLICY, "duoserve, compiled, with a predictor, bf12", QUARTER, decode_io(BF12_POLICY), in_table=False),
    Row(BF12_EQUAL, "duoserve, compiled, with a predictor, bf12", EQUAL, decode_io(BF12_EQUAL)),
    Row("llama.cpp bf16, mapped", "llama.cpp, mapped", EQUAL, None),
    Row("accelerate cold, a quarter in RAM", "transformers + accelerate", QUARTER, None),
    Row("accelerate warm", "transformers + accelerate", CACHED, None, in_table=False),
)


def measured(result: Result) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The rows that the result has."""
    return ((row, result["summary"][row.name]) for row in ROWS if row.name in result["summary"])


def opening(result: Result, plot: str, details: str) -> str:
    """What the README opens with; ``plot`` and ``details`` are links."""
    rows = []
    for row, figures in measured(result):
        if not row.in_table:
            continue
        bound = result["bounds"].get(row.bound)
        reached = f"{bound / figures['tpot_s']['median']:.0%}" if bound else ""
        speeds = spread(figures["prefill_tok_s"], "{:.0f}"), spread(figures["decode_tok_s"], "{:.1f}")
        rows.append((row.label, row.experts, *speeds, reached))
    head = ["engine", "experts", "prompt tok/s", "decode tok/s", "of its bound"]
    parts = table(head, rows), warnings(result), f"![decode]({plot})", _said(result, details)
    return "\n\n".join(part for part in parts if part)


def _said(result: Result, details: str) -> str:
    shape, machine = result["shape"], result["machine"]
    return (
        "*Op by op*: decode steps run as single PyTorch operations; *compiled*: as loops that PyTorch's compiler makes."
        "\nA *predictor* guesses the next layer's experts; `lru` does not. *bf12*: bfloat16 in 12 bits, without loss.\n"
        "The *bound* of a decode step: the bytes that it reads (in RAM the active weights) over the best rate that "
        "disk or\nmemory showed in any round.\n\n"
        f"A Mixtral of random weights in bfloat16 ({shape['layers']} layers of {shape['experts']} experts, "
        f"{shape['hidden']} wide),\n{shape['prompt_tokens']} tokens of prompt and {shape['new_tokens']} new ones, "
        f"{result['threads']} threads of one {machine['cpu']} with {', '.join(machine['isa'])}:\nmedians (extremes) of "
        f"rounds in turn, {result['date'].partition(' ')[0]}, commit {result['versions']['commit']}.\n"
        "All engines of the plot, with bytes and verdicts, are under [Measured](#measured);\n"
        f"[conditions, ceilings, checks and versions]({details})."
    )


def plot(result: Result) -> str:
    """Decode speeds as bars, their extremes as lines, in SVG."""
    rows = list(measured(result))
    longest = max(figures["decode_tok_s"]["high"] for _, figures in rows)
    scale = (WIDTH - LABELS - END) / longest
    height = TOP + len(rows) * (BAR + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="8" y="20" font-size="14">Decode, tokens a second: median and extremes</text>',
    ]
    for place, (row, figures) in enumerate(rows):
        lines += _bar(row, figures["decode_tok_s"], TOP + place * (BAR + GAP), scale)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bar(row: Row, speed: dict[str, float], top: int, scale: float) -> list[str]:
    label = escape(f"{row.label.replace('`', '')}: {row.experts}")
    color = OURS if row.name.startswith("duoserve") else THEIRS
    median, low, high = (scale * speed[key] for key in ("median", "low", "high"))
    middle, baseline = top + BAR / 2, top + 13
    return [
        f'<text x="{LABELS - 6}" y="{baseline}" text-anchor="end">{label}</text>',
        f'<rect x="{LABELS}" y="{top}" width="{median:.2f}" height="{BAR}" fill="{color}"/>',
        f'<path d="M{LABELS + low:.1f} {middle}H{LABELS + high:.1f}" stroke="black"/>',
        f'<text x="{LABELS + high + 6:.1f}" y="{baseline}">{speed["median"]:.1f}</text>',
    ]


def main() -> None:
    """Writes the plot, prints the table; with ``--readme`` also writes it there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what bench_cpu.py --json wrote")
    parser.add_argument("--readme", type=Path, help="put the table between this file's markers")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    picture = args.result.with_suffix(".svg")
    picture.write_text(plot(result))
    home = args.readme.resolve().parent if args.readme else Path.cwd()
    links = [os.path.relpath(args.result.resolve().with_suffix(end), home) for end in (".svg", ".md")]
    text = opening(result, *links)
    print(text)
    if args.readme:
        args.readme.write_text(into_readme(args.readme.read_text(), text, MARKERS))


if __name__ == "__main__":
    main()
