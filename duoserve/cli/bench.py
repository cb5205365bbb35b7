"""``duoserve bench``: the commands that measure."""

from __future__ import annotations

from duoserve.cli.bench_report import add_reports
from duoserve.cli.bench_serve import add_serve
from duoserve.cli.options import Subparsers, add_parser

EXAMPLES = """\
  duoserve bench cpu --quick --out /tmp/results
  duoserve bench serve --url http://127.0.0.1:8000 --rate 2
"""


def add_command(commands: Subparsers) -> None:
    """Registers the group."""
    parser = add_parser(commands, "bench", "measure", EXAMPLES)
    benches = parser.add_subparsers(title="benches", metavar="BENCH", required=True)
    add_reports(benches)
    add_serve(benches)
