"""What reports have in common: tables and warnings in Markdown, a place in the README, where a result comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

BUSY_SHARE = 0.05  # of the machine's CPU time in others' hands: beyond it figures are disturbed


def warnings(result: dict[str, Any], texts: Iterable[str]) -> str:
    """Why figures are worth less, in bold and a line each: ``texts``, and that the code was no commit."""
    found = [*texts]
    if "uncommitted" in (result["versions"]["commit"] or "uncommitted"):
        found.append("the code was not a commit")
    return "\n".join(f"**Warning: {text}.**" for text in found)


def not_idle(busiest: float) -> list[str]:
    """A warning, where others had more than BUSY_SHARE of the machine's CPU time."""
    return [f"the machine was not idle: others used up to {busiest:.0%} of its CPU time"] * (busiest > BUSY_SHARE)


def markdown(rows: Iterable[list[str]]) -> str:
    """A table whose first row is its heading."""
    heading, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *body))


def spread(summary: dict[str, float], form: str) -> str:
    """Median (low-high); the extremes only where they differ in print."""
    median, low, high = (form.format(summary[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads in a terminal."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines)


def into_readme(readme: str, report: str, markers: tuple[str, str]) -> str:
    """``readme`` with what stands between the markers replaced; SystemExit where they are not there once each."""
    begin, end = markers
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise SystemExit(f"the README needs one {begin} and, after it, one {end}")
    before, _, rest = readme.partition(begin)
    return f"{before}{begin}\n\n{report}\n\n{end}{rest.partition(end)[2]}"


def software(result: dict[str, Any]) -> str:
    """The versions of what was there."""
    return ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)


def provenance(result: dict[str, Any]) -> str:
    """What was run, when, and for how long."""
    return f"{software(result)}; {result['date']}, {result['seconds']:.0f} s: `{result['command']}`."
