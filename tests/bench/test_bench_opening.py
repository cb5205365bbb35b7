"""What the README shows of measurements is what the benches make of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import bench_quantize
import opening
import shapes
import tables
from cpu import report
from cpu import summary as cpu_summary

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
[PLOT] = re.findall(r"!\[decode\]\((.*)\)", README)
FILE = (ROOT / PLOT).with_suffix(".json")
RESULT = json.loads(FILE.read_text())


def test_the_opening_is_made_from_the_committed_result():
    details = str(Path(PLOT).with_suffix(".md"))
    made = opening.opening(RESULT, PLOT, details)
    assert made.startswith("| engine ") and tables.into_readme(README, made, opening.MARKERS) == README


def test_bounds_and_verdicts_are_those_of_the_rounds():
    made = cpu_summary.judged(shapes.Shape(**RESULT["shape"]), RESULT)
    assert json.loads(json.dumps(made)) == {name: RESULT[name] for name in made}


def test_no_decode_goes_below_its_bound():
    bounded = [(row, found) for row, found in opening.measured(RESULT) if row.bound in RESULT["bounds"]]
    assert len(bounded) >= 8
    assert all(RESULT["bounds"][row.bound] <= found["tpot_s"]["low"] for row, found in bounded)


def test_the_plot_is_made_from_the_committed_result():
    assert (ROOT / PLOT).read_text() == opening.plot(RESULT)


def test_the_other_tables_are_made_from_the_same_result():
    assert tables.into_readme(README, report.headline(RESULT), report.MARKERS) == README
    assert FILE.with_suffix(".md").read_text() == report.render(RESULT) + "\n"


def test_every_result_and_its_markdown_are_of_one_run():
    compared = []
    for file in (ROOT / "bench" / "results").glob("*.json"):
        result, markdown = json.loads(file.read_text()), file.with_suffix(".md").read_text()
        said = [result.get("versions", {}).get("commit"), result.get("date")]
        compared += [(file.name, one in markdown) for one in said if one]
    assert len(compared) >= 30
    assert [name for name, agrees in compared if not agrees] == []


def test_the_table_of_formats_is_made_from_its_result():
    file = ROOT / "bench" / "results" / "quantize-bard.json"
    result = json.loads(file.read_text())
    assert tables.into_readme(README, bench_quantize.formats(result), bench_quantize.MARKERS) == README
    assert file.with_suffix(".md").read_text() == bench_quantize.render(result)


def test_the_opening_shows_what_was_measured_and_no_more():
    summary = {name: figures for name, figures in RESULT["summary"].items() if not name.startswith("accelerate")}
    text = opening.opening(RESULT | {"summary": summary}, "p.svg", "d.md")
    ours = [row for row in opening.ROWS if row.name in summary and row.name.startswith("duoserve") and row.in_table]
    assert "accelerate" not in text and text.count("| duoserve") == len(ours) >= 2


def test_what_the_opening_leaves_out_is_in_the_table_of_all_engines():
    left_out = [row for row, _ in opening.measured(RESULT) if not row.in_table]
    table = report.headline(RESULT)
    assert left_out and all(f"| {row.name} " in table for row in left_out)


def test_bars_are_as_long_as_speeds():
    picture = opening.plot(RESULT)
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="18"', picture)]
    speeds = [figures["decode_tok_s"]["median"] for _, figures in opening.measured(RESULT)]
    assert len(widths) == len(speeds) == sum(row.name in RESULT["summary"] for row in opening.ROWS)
    assert [w / widths[0] for w in widths] == pytest.approx([s / speeds[0] for s in speeds], abs=2e-3)
