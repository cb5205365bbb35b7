"""From prompts to a trace: the model runs, and what its routers choose is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from duoserve.config import EngineConfig
from duoserve.errors import RequestError, TraceError
from duoserve.files.positional import is_file
from duoserve.loading.load import Runtime, load
from duoserve.loading.placement import Placement
from duoserve.models.opened import opened
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import Policy
from duoserve.text.prompts import Prompt, encode
from duoserve.traces.recorder import TraceRecorder
from duoserve.traces.trace import TOKEN_IDS, Trace, TraceMeta
from duoserve.traces.trace_file import TraceWriter, open_trace


@dataclass(frozen=True)
class RecordingSpec:
    """How a trace is recorded: every prompt is run with ``params``, the prompt's number added to their seed.

    ``resume``: ``out`` has the first of the prompts already, and the others are added. ``append``: ``out`` has other
    requests, and all prompts are added.
    """

    out: Path
    params: SamplingParams
    resume: bool = False
    append: bool = False


def record(  # noqa: PLR0913
    model: str | Path,
    prompts: Sequence[Prompt],
    recording: RecordingSpec,
    wanted: EngineConfig,
    policy: str | Policy = "auto",
    *,
    progress: bool = False,
) -> Trace:
    """Runs ``prompts`` one after the other, and gives the trace that is then in ``recording.out``.

    Raises TraceError if a file is in the way, or if it has the trace of another model or of other settings, and
    RequestError for a prompt that cannot be served, before the first is run.
    """
    if _is_in_the_way(recording.out) and not (recording.resume or recording.append):
        raise TraceError(f"{recording.out}: exists; --resume finishes it, --append adds to it, or give another --out")
    with opened(model) as found:
        fingerprint, config = found.checkpoint.fingerprint(), found.config
        conditions = _conditions(Placement.of(found, wanted).dtype, wanted.quantize, recording.params)
    meta = TraceMeta(fingerprint, config.moe_layers, config.num_experts, config.top_k, conditions)
    recorder = TraceRecorder()
    with (
        closing(TraceWriter(recording.out, meta)) as writer,
        closing(load(model, wanted, policy, None, recorder)) as runtime,
    ):
        encoded = [encode(runtime.tokenizer, prompt) for prompt in prompts]
        _check(runtime, encoded, recording.params.max_tokens)
        done = _check_done(recording.out, encoded) if recording.resume else 0
        numbered = list(enumerate(encoded))[done:]
        for number, token_ids in tqdm(numbered, desc="trace", unit="prompt", disable=not progress):
            request = Request(token_ids, replace(recording.params, seed=(recording.params.seed or 0) + number))
            fed = token_ids + [token for _, token in runtime.engine.generate([request])][:-1]
            writer.append(fed, len(token_ids), recorder.take())
    return open_trace(recording.out, fingerprint)


def _conditions(dtype: torch.dtype, quantize: str | None, params: SamplingParams) -> str:
    """The settings that requests of one trace must share; their number of tokens, stops and seed may differ."""
    drawn = {name: value for name, value in vars(params).items() if name not in {"max_tokens", "stop", "seed"}}
    return json.dumps({"dtype": str(dtype).removeprefix("torch."), "quantize": quantize} | drawn)


def _is_in_the_way(path: Path) -> bool:
    """Whether a file must not be overwritten. A recording that fails before its first request leaves an empty file."""
    return is_file(path) and path.stat().st_size > 0


def _check(runtime: Runtime, prompts: Sequence[list[int]], max_tokens: int) -> None:
    for number, token_ids in enumerate(prompts, 1):
        try:
            runtime.engine.limits.check(token_ids, max_tokens)
        except RequestError as error:
            raise RequestError(f"prompt {number}: {error}") from error


def _check_done(out: Path, prompts: Sequence[list[int]]) -> int:
    """How many of the prompts are in the trace already; raises TraceError if it has other prompts."""
    if not out.stat().st_size:
        return 0
    trace = open_trace(out)
    if len(trace) > len(prompts):
        raise TraceError(f"{out}: has {len(trace)} requests, but there are {len(prompts)} prompts to resume with")
    token_ids_N, sizes = trace.read(TOKEN_IDS), trace.requests_R2[:, 1].tolist()
    for number, (start, num_prompt, prompt) in enumerate(zip(trace.starts_R.tolist(), sizes, prompts, strict=False)):
        if token_ids_N[start : start + num_prompt].tolist() != prompt:
            raise TraceError(f"{out}: request {number} has another prompt; resume with the prompts it began with")
    return len(trace)
