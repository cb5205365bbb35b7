"""What bench/plan_here.py found, as Markdown: ``python bench/plan_here_report.py RESULT.json``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tables import markdown, not_idle, warnings

WITHIN = 0.15
BUSY = 0.08  # of the machine's CPU time in others' hands: such a run is tried again
FIGURES = (("TTFT", "s", "ttft_s", "planned_ttft_s", 1.0), ("TPOT", "ms", "tpot_s", "planned_tpot_s", 1e3))
BY_HITS = ("TPOT, with its hits", "ms", "tpot_s", "tpot_s_by_hits", 1e3)


class Verdict(NamedTuple):
    """Medians over the rounds; the error is that of pairs."""

    known: float
    planned: float
    error: float

    @property
    def within(self) -> bool:
        """At most WITHIN off."""
        return abs(self.error) <= WITHIN

    @classmethod
    def of(cls, rounds: Sequence[dict[str, Any]], known: str, planned: str) -> Verdict:
        """Of what a cell's rounds have under these names."""
        pairs = [(one[known], one[planned]) for one in rounds]
        error = statistics.median(theirs / ours for ours, theirs in pairs) - 1
        return cls(*(statistics.median(column) for column in zip(*pairs, strict=True)), error)


def report(result: dict[str, Any]) -> str:
    """The whole page."""
    return "\n\n".join([*_opening(result), _table(result["cells"]), *_closing(result)]) + "\n"


def _opening(result: dict[str, Any]) -> Iterator[str]:
    machine, versions, size, cells = result["machine"], result["versions"], result["size"], result["cells"]
    yield "# The planner on this machine"
    if said := warnings(result, not_idle(_busiest(cells))):
        yield said
    yield (
        f"`{result['command']}`, {result['date']}, commit {versions['commit']}, torch {versions['torch']}; "
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['isa'])}), "
        f"{machine['ram_bytes'] / 2**30:.0f} GiB, {machine['disk']['filesystem']} on {machine['disk']['source']}."
    )
    yield (
        f"Prompts of {size['prompt']} tokens and {size['new_tokens']} new ones; medians over {len(cells[0]['rounds'])} "
        "rounds. In each round a model's layers are rehearsed before each three runs of a policy; the "
        "error is the median over the rounds of planned over measured. A run in which others used more than "
        f"{BUSY:.0%} of the CPU time is tried again, once. Hit rates of embedded models are those of their "
        "own card, of random weights those of chance; *by its hits* has those that there were."
    )
    yield "\n".join(_counted(cells))


def _busiest(cells: list[dict[str, Any]]) -> float:
    return max(done["foreign_cpu"] for cell in cells for done in cell["rounds"])


def _counted(cells: list[dict[str, Any]]) -> Iterator[str]:
    for name, _, known, planned, _ in (*FIGURES, BY_HITS):
        verdicts = [Verdict.of(cell["rounds"], known, planned) for cell in cells]
        yield f"- {name}: {_within(verdicts)}"
    for name, _, known, planned, _ in FIGURES:
        kept = [[one | {planned: cell["rounds"][0][planned]} for one in cell["rounds"]] for cell in cells]
        verdicts = [Verdict.of(rounds, known, planned) for rounds in kept]
        yield f"- {name}, if the first round's rehearsal is kept for all: {_within(verdicts)}"


def _within(verdicts: Sequence[Verdict]) -> str:
    worst = max((verdict.error for verdict in verdicts), key=abs)
    return f"{sum(v.within for v in verdicts)} of {len(verdicts)} within {WITHIN:.0%}, the worst {worst:+.0%}"


def _table(cells: list[dict[str, Any]]) -> str:
    heading = ["model", "slots", "policy", "from"]
    for name, unit, *_ in FIGURES:
        heading += [f"{name} {unit}", "planned", "error", "verdict"]
    rows = [[*heading, "by its hits", "error", "hits", "planned"]]
    for cell in cells:
        row = [str(cell[name]) for name in ("model", "slots", "policy", "tier")]
        for _, _, known, planned, scale in FIGURES:
            row += _cells(Verdict.of(cell["rounds"], known, planned), scale)
        by_hits = Verdict.of(cell["rounds"], *BY_HITS[2:4])
        hits, planned_hits = (statistics.median(one[key] for one in cell["rounds"]) for key in ("hits", "planned_hits"))
        rows.append(
            [*row, f"{1e3 * by_hits.planned:.3g}", f"{by_hits.error:+.0%}", f"{hits:.0%}", f"{planned_hits:.0%}"]
        )
    return markdown(rows)


def _cells(verdict: Verdict, scale: float) -> list[str]:
    said = f"within {WITHIN:.0%}" if verdict.within else "**off**"
    return [f"{scale * verdict.known:.3g}", f"{scale * verdict.planned:.3g}", f"{verdict.error:+.0%}", said]


def _closing(result: dict[str, Any]) -> Iterator[str]:
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in result["hardware"].items())
    before, after = (f"{result.get(f'others_{when}', 0.0):.0%}" for when in ("before", "after"))
    most = _busiest(result["cells"])
    yield f"Others used {before} of the CPU time before, {after} after, and at most {most:.0%} in a run."
    yield f"Rates of the machine, before all rounds: {rates} (bytes/s, FLOP/s, seconds)."
    yield "\n".join(f"- {check}: {'passed' if passed else 'FAILED'}" for check, passed in result["checks"].items())


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
