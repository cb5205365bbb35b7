"""The curves of a batching bench's result: tokens a second over the batch, and requests in time over their rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batching.goodput_search import ATTAINED

Result = dict[str, Any]
NAMES = {"fcfs": "first come first served", "slo": "by slack"}
COLORS = {"fcfs": "tab:gray", "slo": "tab:blue"}


def draw(path: Path, result: Result) -> None:
    """An SVG with a panel for each model and store, and one for each model's goodput; the same bytes for a result."""
    panels = len(result["cells"]) + len(result["goodput"])
    columns = min(panels, 3)
    figure = Figure(figsize=(4.2 * columns, 3.4 * -(-panels // columns)), layout="constrained")
    axes = list(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)
    for cell, axis in zip(result["cells"], axes, strict=False):
        _batches(axis, cell)
    for found, axis in zip(result["goodput"], axes[len(result["cells"]) :], strict=False):
        _goodput(axis, found)
    for axis in axes[panels:]:
        axis.set_axis_off()
    with mpl.rc_context({"svg.hashsalt": "duoserve", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _batches(axis: Axes, cell: Result) -> None:
    """Tokens a second, what the bound would allow, and the 95th percentile of gaps between tokens."""
    sizes = [row["batch"] for row in cell["rows"]]
    axis.plot(sizes, [row["tok_s"] for row in cell["rows"]], "o-", color="tab:blue", label="measured")
    allowed = [1e3 * row["batch"] / row["bound_ms"] for row in cell["rows"]]
    axis.plot(sizes, allowed, ":", color="tab:gray", label="what its bytes allow")
    axis.set(xlabel="batch", ylabel="tokens/s", ylim=(0, None), title=f"{cell['model']}, {cell['experts']}")
    gaps = axis.twinx()
    gaps.plot(sizes, [row["itl_p95_ms"] for row in cell["rows"]], "x--", color="tab:orange", label="p95 ITL, ms")
    gaps.set(ylabel="ms", ylim=(0, None))
    axis.set_xticks(sizes)
    lines = [*axis.get_lines(), *gaps.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], fontsize="small")


def _goodput(axis: Axes, found: Result) -> None:
    """Requests inside both objectives, by rate and scheduler."""
    for name, label in NAMES.items():
        tried = found[name]["tried"]
        shares = [100 * trial["attained"] for trial in tried]
        axis.plot([trial["rate"] for trial in tried], shares, "o-", color=COLORS[name], label=label)
        if found[name]["goodput"] is not None:
            axis.axvline(found[name]["goodput"], color=COLORS[name], linestyle=":")
    axis.axhline(100 * ATTAINED, color="black", linewidth=0.6)
    axis.set(xlabel="requests/s", ylabel="inside both objectives, %", ylim=(0, 103), title=f"{found['model']}, disk")
    axis.legend(fontsize="small")
