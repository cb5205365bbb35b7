"""A result of ``bench_reality`` as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tables import markdown, not_idle, provenance, warnings

LIMIT = 0.15

Model = Mapping[str, Any]


def targets(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Of each model and figure: in how many cells the replay is within LIMIT, and the worst."""
    found = []
    for model in models:
        for key in ("ttft_s", "tpot_s"):
            errors = {f"{cell['policy']}, {cell['slots']} slots": cell["errors"][key] for cell in model["cells"]}
            worst = max(errors, key=lambda name: abs(errors[name]))
            inside = sum(abs(error) <= LIMIT for error in errors.values())
            found.append(
                {
                    "name": f"{model['model']}: {key.removesuffix('_s').upper()} of replays within {LIMIT:.0%}",
                    "inside": inside,
                    "cells": len(errors),
                    "reached": inside == len(errors),
                    "worst": f"{errors[worst]:+.1%} ({worst})",
                    "median": statistics.median(map(abs, errors.values())),
                }
            )
    return found


def render(result: dict[str, Any]) -> str:
    """Conditions, verdicts, then a table of cells and one of the machine for each model."""
    parts = [_warnings(result), _conditions(result), _verdicts(result)]
    for model in result["models"]:
        parts += [f"## {model['model']}", _sizes(model), markdown(_cells(model)), markdown(_machine(model))]
    outcomes = [f"{check['name']}: {'passed' if check['passed'] else '**FAILED**'}" for check in result["checks"]]
    parts.append("Checks in the same run: " + "; ".join(outcomes) + ".")
    return "\n\n".join(part for part in parts if part)


def _warnings(result: dict[str, Any]) -> str:
    idle = result["idle"]
    busiest = max(idle["foreign_cpu_before"], idle["foreign_cpu_after"], *(m["foreign_cpu"] for m in result["models"]))
    quick = ["this is `--quick`: it checks the bench and measures nothing"] * result["quick"]
    return warnings(result, quick + not_idle(busiest))


def _conditions(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    rows = [
        f"{machine['cpu']} (family/model {machine['cpu_family_model']}), {machine['cores']} cores, {result['threads']} "
        f"threads compute and {result['copy_threads']} copy, {', '.join(machine['isa']) or 'no listed ISA extension'}, "
        f"{machine['ram_bytes'] / 2**30:.0f} GiB RAM, Linux {machine['kernel']}; {machine['disk']['filesystem']} on "
        f"{machine['disk']['source']}.",
        provenance(result),
        f"Medians of {result['rounds']} rounds (extremes) behind one that fills the slots; all cells in turn in each "
        "round. Errors are those of the replayed medians. Hits are of decode steps.",
    ]
    return "\n".join(f"- {row}" for row in rows)


def _verdicts(result: Mapping[str, Any]) -> str:
    rows = [["target", "cells", "verdict", "median error", "worst"]]
    for found in result["targets"]:
        verdict = "reached" if found["reached"] else "NOT reached"
        rows.append(
            [found["name"], f"{found['inside']} of {found['cells']}", verdict, f"{found['median']:.1%}", found["worst"]]
        )
    return markdown(rows)


def _sizes(model: Model) -> str:
    resident = {key: statistics.median(values) for key, values in model["resident"].items()}
    return (
        f"{model['experts']} experts of {model['expert_bytes']} bytes; {model['prompt_tokens']}-token prompts, "
        f"{model['new_tokens']} new tokens. With all experts in slots TTFT is {1e3 * resident['ttft_s']:.1f} ms "
        f"and TPOT {1e3 * resident['tpot_s']:.2f} ms. Others used {model['foreign_cpu']:.0%} of the CPU time meanwhile."
    )


def _cells(model: Model) -> Iterator[list[str]]:
    figures = [what for name in ("TTFT", "TPOT") for what in (f"{name} ms", "replayed", "error")]
    yield ["slots", "policy", *figures, "hits", "replayed", f"within {LIMIT:.0%}"]
    for cell in model["cells"]:
        columns = [text for key in ("ttft_s", "tpot_s") for text in _compared(cell, key)]
        hits = [f"{cell['hit_rates'][which]:.1%}" for which in ("measured", "replayed")]
        inside = all(abs(error) <= LIMIT for error in cell["errors"].values())
        yield [str(cell["slots"]), cell["policy"], *columns, *hits, "yes" if inside else "**no**"]


def _compared(cell: Mapping[str, Any], key: str) -> list[str]:
    measured, replayed = cell["measured"][key], statistics.median(cell["replayed"][key])
    low, middle, high = (1e3 * value for value in (min(measured), statistics.median(measured), max(measured)))
    return [f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{1e3 * replayed:.2f}", f"{cell['errors'][key]:+.1%}"]


def _machine(model: Model) -> Iterator[list[str]]:
    """What the replays ran on."""
    timed = model["machine"]
    threads = timed["hardware"]["readers"]
    rates = " / ".join(f"{threads[which] / 1e9:.2f}" for which in ("alone", "together"))
    yield ["measured of the machine", ""]
    yield ["reads of an expert, one at a time / all threads", f"{rates} GB/s"]
    yield ["the same into memory that was used just before", f"{threads['warm']:.2f}x as fast"]
    for what, key in (
        ("a copy is queued", "queue_s"),
        ("a copy is queued and a thread woken", "rouse_s"),
        ("a woken thread begins to read", "wake_s"),
        ("between two reads of a thread", "between_s"),
        ("the host goes on when a copy has ended", "notice_s"),
        ("and loses of its next computing", "resumed_s"),
    ):
        yield [what, f"{1e6 * threads[key]:.0f} us"]
    yield ["experts computed together, beyond each", f"{1e6 * timed['launch']:.0f} us"]
    counts = ", ".join(f"{count}: {1e6 * seconds:.0f}" for count, seconds in timed["experts"])
    yield ["an expert, by tokens", f"{counts} us"]
    for name in ("prompt", "step"):
        times = timed[name]
        yield [f"{name}: a layer up to its router", f"{1e6 * times['before']:.0f} us"]
        yield [f"{name}: outside of the layers", f"{1e6 * times['rest']:.0f} us"]
        yield [f"{name}: telling the routing, scores", f"{1e6 * times['hearing']:.0f}, {1e6 * times['scores']:.0f} us"]
        yield [
            f"{name}: an expert that has just come, one that was there before",
            f"+{1e6 * times['fresh']:.0f}, +{1e6 * times['cold']:.0f} us",
        ]
        yield [
            f"{name}: computing loses to a thread that is woken, a read that ends beside it",
            f"{1e6 * times['roused']:.0f}, {1e6 * times['ended']:.0f} us",
        ]
