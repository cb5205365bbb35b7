"""How long a newcomer waits: the verdicts, and a result of ``bench_newcomer`` as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from tables import markdown, not_idle, provenance, warnings

MARKERS = "<!-- newcomer -->", "<!-- /newcomer -->"
LIMIT_S = 300.0  # five minutes, downloads not counted
SET_UP, DOWNLOAD, FIRST_TEXT, EVALUATE = "set-up", "download", "first text", "evaluate"

Result = dict[str, Any]


def verdicts(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both paths against the limit; a step that was not measured (seconds None) leaves its path without a verdict."""
    paths = {
        "clean machine to first text": (SET_UP, FIRST_TEXT),
        "a policy evaluated on own prompts": (EVALUATE,),
    }
    found = []
    for name, kinds in paths.items():
        seconds = [step["seconds"] for step in steps if step["kind"] in kinds]
        total = None if None in seconds or not seconds else sum(seconds)
        verdict = "not measured" if total is None else "reached" if total <= LIMIT_S else "missed"
        found.append({"path": name, "seconds": total, "limit_s": LIMIT_S, "verdict": verdict})
    return found


def render(result: Result) -> str:
    """Warnings, conditions, a line a step, and the verdicts."""
    rows = [[step["kind"], f"`{step['command']}`", _seconds(step["seconds"])] for step in result["steps"]]
    ends = [
        [found["path"], f"<= {found['limit_s']:.0f} s", f"{found['verdict']}: {_seconds(found['seconds'])}"]
        for found in result["verdicts"]
    ]
    parts = [
        _warnings(result),
        _conditions(result),
        markdown([["step", "command", "seconds"], *rows]),
        markdown([["path, without downloads", "asked", "verdict"], *ends]),
    ]
    return "\n\n".join(part for part in parts if part)


def sentence(result: Result, details: str) -> str:
    """What the README says of it; ``details``: the file that says more."""
    text, evaluated = (found["seconds"] for found in result["verdicts"])
    build = ", torch's CPU build" if "+cpu" in result["versions"]["torch"] else ""
    said = (
        f"On {result['machine']['cores']} cores of an {result['machine']['cpu']} the first text is there {text:.0f} s "
        f"after the first command, and a policy is chosen for {result['prompts']} prompts of one's own in "
        f"{evaluated:.0f} s, downloads ({result['download_bytes'] / 1e6:.0f} MB{build}) not counted (`{details}`)."
    )
    return textwrap.fill(said, 120, break_on_hyphens=False, break_long_words=False)


def _warnings(result: Result) -> str:
    found = ["this is `--quick`: no environment was made"] if result["quick"] else []
    found += not_idle(max(result["idle"].values()))
    return warnings(result, found)


def _conditions(result: Result) -> str:
    machine, disk = result["machine"], result["machine"]["disk"]
    download = f"{result['download_bytes'] / 1e6:.0f} MB" if result["download_bytes"] else "nothing"
    rows = [
        f"{machine['cpu']} (family/model {machine['cpu_family_model']}), {machine['cores']} cores, "
        f"{machine['ram_bytes'] / 2**30:.0f} GiB RAM, Linux {machine['kernel']}; {disk['filesystem']} on "
        f"{disk['source']}; others used {result['idle']['before']:.0%} of the CPU time before, "
        f"{result['idle']['after']:.0%} after.",
        provenance(result),
        f"{download} downloaded beforehand into a folder, which the installation then reads; torch is the build that "
        f"the package index in use gives. {result['prompts']} prompts, {result['max_tokens']} tokens each.",
        f"First output of the first text after {_seconds(result['first_output_s'])} s; evaluate chose "
        f"{result['chosen']!r}.",
    ]
    return "\n".join(f"- {row}" for row in rows)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
