"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def markdown(rows: Iterable[list[str]]) -> str:
    """A table whose first row is its heading."""
    heading, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *body))
