"""Puts a load on a server, once or at the rates that a search for goodput asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from duoserve.errors import RequestError
from duoserve.interface import Objectives
from duoserve.loadtest.client import Target, answers, served_model
from duoserve.loadtest.figures import GoodputSearch, said_of, summary
from duoserve.loadtest.workload import Workload

__all__ = ["Target", "measured"]


async def measured(
    target: Target, load: Workload, search: GoodputSearch, objectives: Objectives, say: Callable[[str], None]
) -> dict[str, Any]:
    """``url``, ``model``, and a summary of each rate that ``search`` asks for; raises the errors of the client.

    All trials send the same requests; ``say`` is given a line after each. Raises RequestError if nothing is answered in
    the first trial; in a later one that makes a bad rate.
    """
    trials: list[dict[str, Any]] = []
    async with target.client() as client:
        target = replace(target, model=await served_model(client, target.model))
        while (rate := search.next_rate()) is not None:
            found = summary(await answers(client, target, load.asked(), load.times(rate)), objectives)
            if not trials and found["failed"] == found["requests"]:
                raise RequestError(f"all {found['failed']} requests failed; the first: {found['first_error']}")
            trials.append({"rate": rate, **found})
            search.record(rate, found["attained"] or 0.0)  # None without objectives, and then one rate is tried
            say(f"{rate:.3g} requests/s: {said_of(found)}")
    return {"url": target.url, "model": target.model, "trials": trials}
