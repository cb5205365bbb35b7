"""How decode steps are launched: op by op as the model is written, layer by layer ("event"), or whole ("graph").

On a CPU what lies between two layers' experts can be compiled ("compiled").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from duoserve.callers import warn_caller
from duoserve.errors import CompilerError, ConfigError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.kernels.compiled.compiler import CpuCompiler, can_compile, cpp_compiler
from duoserve.kernels.cuda_graphs import CudaRecorder
from duoserve.kv_cache import NewTokens, PagedKVCache
from duoserve.launching.compiled import compiled_runner
from duoserve.launching.event import event_steps
from duoserve.launching.graph import graph_steps, host_rows
from duoserve.launching.link import LinkRates, link_rates, seconds_on_gpu
from duoserve.launching.recorded import RecordedRunner
from duoserve.models.parts import moe_blocks
from duoserve.models.transformer import Transformer
from duoserve.passes import StepRunner
from duoserve.scheduling.plan import DecodeFetch
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.scheduler import Scheduler

# A step that reads its misses through saves the host's round trips, some 20 us a layer. With less than this share of
# the copies' rate its misses cost more than that.
ZERO_COPY_SHARE = 0.85


@dataclass(frozen=True)
class VariantRunner(StepRunner):
    """Computes decode steps with ``model``, a variant (models/variants.py) of the model that computes the prompts."""

    model: Transformer
    cache: PagedKVCache

    def __call__(self, new_tokens: NewTokens) -> Tensor:
        """As in StepRunner."""
        return self.model(self.cache.batch(new_tokens), new_tokens.last_rows).cpu()

    def prepare(self, num_sequences: int) -> None:
        """Does nothing: the first step takes no longer than the others."""


class Launch(Enum):
    """What launches a decode step."""

    MODEL = "model"
    EVENT = "event"
    GRAPH = "graph"
    COMPILED = "compiled"


@dataclass(frozen=True)
class StepParts:
    """All that a runner is built from. ``store`` holds every expert; the slots of ``pool`` are EMPTY or READY."""

    model: Transformer
    cache: PagedKVCache
    scheduler: Scheduler
    store: ExpertStore
    pool: SlotPool

    def readable(self) -> bool:
        """Whether all experts lie in pinned RAM, which the kernels of a GPU can read."""
        experts = (ExpertId(b.layer, e) for b in moe_blocks(self.model) for e in range(b.num_experts))
        return all((row_B := self.store.host_row(expert)) is not None and row_B.is_pinned() for expert in experts)

    def measure_link(self) -> LinkRates:
        """Measures how fast experts come over the link; overwrites the first slots."""
        rows = host_rows(moe_blocks(self.model)[0], self.store, self.cache.device)
        return link_rates(rows, self.pool, seconds_on_gpu)


def make_step_runner(mode: str, policy: Policy, parts: StepParts) -> StepRunner | None:
    """The runner for ``mode`` (see ``choose_launch``); None where the model computes its own decode steps.

    Call it before any expert is in a slot, or after all are: measuring the link overwrites slots.
    """
    launch = choose_launch(mode, parts.cache.device, policy, parts.readable, parts.measure_link)
    if launch is Launch.MODEL:
        return None
    model, cache = parts.model, parts.cache
    if launch is Launch.COMPILED:
        return compiled_runner(model, cache)
    recorder = CudaRecorder(cache.device)
    if launch is Launch.EVENT:
        return RecordedRunner(model, cache, event_steps(model, cache, recorder))
    books = parts.scheduler.read_through()
    return RecordedRunner(model, cache, graph_steps(model, cache, recorder, parts.store, books))


def resolve_mode(mode: str, device: torch.device) -> str:
    """The decode mode to use on ``device`` for ``mode``, wherever the experts are; ConfigError if it has no such mode.

    For "compiled" a small loop is compiled as a trial, which takes a second or two; if that fails, the answer is
    "auto", with a warning that says why.
    """
    _check_device(mode, device)
    if mode != "compiled" or (obstacle := _compiler_fault()) is None:
        return mode
    warn_caller(
        f"decode_mode='compiled' takes a C++ compiler, and {obstacle}: decode steps run op by op, more slowly "
        "(install one, or name it in CXX)"
    )
    return "auto"


def _compiler_fault() -> str | None:
    """Why nothing can be compiled, None if it can. Only a trial shows it: Python.h may be missing, for one."""
    if not can_compile():
        return f"there is no {cpp_compiler()!r}"
    try:
        CpuCompiler().record(lambda: torch.ones(64, device="cpu") + 1)
    except CompilerError as error:
        return f"{cpp_compiler()!r} fails ({error})"
    return None


def _check_device(mode: str, device: torch.device) -> None:
    if mode in ("event", "graph") and device.type != "cuda":
        raise ConfigError(f"decode_mode={mode!r} takes CUDA graphs, but the device is {device}: use 'auto'")
    if mode == "compiled" and device.type == "cuda":
        raise ConfigError(f"decode_mode='compiled' is for CPUs, but the device is {device}: use 'auto'")


def choose_launch(
    mode: str,
    device: torch.device,
    policy: Policy,
    readable: Callable[[], bool],
    measure: Callable[[], LinkRates],
) -> Launch:
    """What launches decode steps for ``mode``, which ``resolve_mode`` has accepted; ConfigError if no graph can be had.

    A policy that brings whole layers ahead, or computes none of a layer's experts before all are there, needs the host
    between the layers; what others guess can be copied between the steps. ``readable`` and ``measure`` are called only
    where their answer counts.
    """
    if device.type != "cuda":
        return Launch.COMPILED if mode == "compiled" else Launch.MODEL
    if mode == "event":
        return Launch.EVENT
    obstacle = _obstacle(policy, readable)
    if obstacle is not None:
        if mode == "graph":
            raise _no_graph(obstacle)
        return Launch.EVENT
    if mode == "graph" or policy.all_resident:
        return Launch.GRAPH
    rates = measure()
    return Launch.GRAPH if rates.zero_copy >= ZERO_COPY_SHARE * rates.copy else Launch.EVENT


def check_graph(policy: Policy, in_ram: bool) -> None:
    """ConfigError where "graph" cannot be had, even if all memory can be page-locked: what is known before loading.

    ``in_ram``: all experts will lie in RAM.
    """
    obstacle = _obstacle(policy, lambda: in_ram)
    if obstacle is not None:
        raise _no_graph(obstacle)


def _no_graph(obstacle: str) -> ConfigError:
    return ConfigError(f"decode_mode='graph' cannot be had: {obstacle}; use 'event' or 'auto'")


def _obstacle(policy: Policy, readable: Callable[[], bool]) -> str | None:
    """Why the device cannot carry out a step by itself, None if it can."""
    if policy.all_resident:
        return None
    if policy.decode is not DecodeFetch.CACHE:
        return f"policy {policy.name!r} moves experts between the layers of a step"
    if not readable():
        return (
            "not all experts lie in pinned host memory (if each has a slot choose policy 'resident', "
            "else raise host_memory, or the limit of locked memory, ulimit -l)"
        )
    return None
