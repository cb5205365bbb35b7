"""Draws plans; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from duoserve.cli.plots import new_figure, save
from duoserve.planning.planner import Plan, Planner
from duoserve.replaying.hardware import GIB

POINTS = 24


def draw_plans(path: Path, planner: Planner, plans: Sequence[Plan]) -> None:
    """Draws TPOT of the best policy over memory: a curve for each machine, with a dot for its plan.

    Raises ConfigError if matplotlib is not installed, or if the file cannot be written.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for plan in plans:
        points = tpot_over_memory(planner, plan)
        line = axes.plot([x / GIB for x, _ in points], [1e3 * y for _, y in points], label=plan.hardware.name)[0]
        axes.plot(plan.memory.total_bytes / GIB, 1e3 * plan.best.tpot.total, "o", color=line.get_color())
    axes.set(xlabel="memory, GiB", ylabel="TPOT, ms", yscale="log", title=f"{planner.name}, the best policy")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def tpot_over_memory(planner: Planner, plan: Plan) -> list[tuple[int, float]]:
    """(bytes, TPOT) from the fewest slots that work to one for every expert, as if the machine had that memory."""
    memory, top_k = plan.memory, planner.model.config.top_k
    # Where all experts have slots none wait, but with fewer slots some do.
    waiting = max(memory.host_bytes, plan.question.host_memory or 0)
    least = min(top_k + 1, memory.total_experts)
    counts = sorted({least + (memory.total_experts - least) * n // (POINTS - 1) for n in range(POINTS)})
    found = []
    for count in counts:
        nbytes = memory.fixed_bytes + count * memory.slot_bytes
        hardware = replace(
            plan.hardware, memory_bytes=2 * nbytes + waiting, host_bytes=max(plan.hardware.host_bytes, waiting)
        )
        at = planner.plan(hardware, replace(plan.question, memory=nbytes, expert_slots=None))
        found.append((nbytes, at.best.tpot.total))
    return found
