"""Draws replays, and has what all plots share; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duoserve.errors import ConfigError
from duoserve.replaying.hardware import Machine
from duoserve.replaying.replay import Watcher, replay
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.predictor import Predictor
from duoserve.traces.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Span = tuple[float, float]


def draw(path: Path, rows: Sequence[Mapping[str, Any]], lanes: tuple[list[Span], list[Span]], title: str) -> None:
    """Draws hit rates over capacity by policy, and below that a decode step's copy lane, compute lane and stalls.

    Raises ConfigError if matplotlib is not installed, or if the file cannot be written.
    """
    figure = new_figure(9, 7)
    above, below = figure.subplots(2, 1, height_ratios=[3, 1])
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        above.plot([row["slots"] for row in mine], [100 * (row["hit_rate"] or 0) for row in mine], "o-", label=policy)
    above.set(xlabel="slots", ylabel="hits in decode, %", title=title)
    above.legend()
    copies, work = lanes
    for lane, (spans, color) in enumerate([(stalls(work), "tab:red"), (work, "tab:blue"), (copies, "tab:orange")]):
        below.broken_barh(
            [(1e3 * start, 1e3 * (stop - start)) for start, stop in spans], (lane - 0.4, 0.8), color=color
        )
    below.set_yticks(range(3), ["stall", "compute", "copy"])
    below.set(xlabel="ms of one decode step")
    save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, with its size in inches; raises ConfigError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'duoserve[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Writes the figure in the format that the file's name ends in; raises ConfigError if that is impossible."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not have
        raise ConfigError(f"--plot {path}: cannot be drawn ({error})") from error


def stalls(work: Sequence[Span]) -> list[Span]:
    """The spans in which the compute lane stood still between two jobs."""
    return [(before[1], after[0]) for before, after in pairwise(work) if after[0] > before[1]]


def one_step(
    trace: Trace, policy: Policy, machine: Machine, num_slots: int, predictor: Predictor | None
) -> tuple[list[Span], list[Span]]:
    """Copies and computation in the last decode step of a replay, from 0 on."""
    copies: list[Span] = []
    work: list[Span] = []
    watcher = Watcher(
        lambda start, stop, nbytes: copies.append((start, stop)), lambda start, stop, layer: work.append((start, stop))
    )
    done = replay(trace, policy, machine, num_slots, predictor=predictor, watcher=watcher)
    end = max(stop for _, stop in work)
    begin = end - (done.itl_s or done.ttft_s)[-1]
    return _since(begin, end, copies), _since(begin, end, work)


def _since(begin: float, end: float, spans: Sequence[Span]) -> list[Span]:
    within = [(max(start, begin), min(stop, end)) for start, stop in spans if stop > begin and start < end]
    return [(start - begin, stop - begin) for start, stop in within]
