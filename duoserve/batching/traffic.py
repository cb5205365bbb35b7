"""The engine's requests as ``next_work.py`` sees them: plain data."""

from __future__ import annotations

from dataclasses import replace

from duoserve.batching.next_work import RunningPrefill, RunningRequest, WaitingRequest
from duoserve.kv_cache import PagedKVCache
from duoserve.passes import Prefill
from duoserve.request import Request


def as_waiting(request: Request, answer_room: int) -> WaitingRequest:
    """A waiting request. It will start with room for ``answer_room`` tokens beyond those that it has."""
    objectives = request.objectives
    if request.first_token is not None:
        objectives = replace(objectives, ttft_s=None)
    return WaitingRequest(
        request.arrived or 0.0,
        len(request.prompt_ids),
        PagedKVCache.whole_pages(request.room(answer_room)),
        objectives,
        request.sent_back,
        request.params.max_tokens,
    )


def as_running(request: Request) -> RunningRequest:
    """A running request."""
    tokens = len(request.output_ids)
    left, tpot_s = request.params.max_tokens - tokens, request.objectives.tpot_s
    return RunningRequest(request.first_token or 0.0, tokens, left, request.kv.room, tpot_s)


def as_running_prefill(prefill: Prefill, num_layers: int) -> RunningPrefill:
    """The prefill that is under way, on a model of ``num_layers`` layers."""
    left = num_layers - prefill.partial.next_layer
    arrived = min(request.arrived or 0.0 for request in prefill.requests)
    room = sum(request.kv.room for request in prefill.requests)
    longest = max(request.params.max_tokens for request in prefill.requests)
    return RunningPrefill(prefill.num_tokens, len(prefill.requests), left, arrived, room, longest)
