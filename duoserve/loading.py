"""From a checkpoint to a running engine: check, plan the memory, place the weights, wire the floors together."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from duoserve.config import EngineConfig, ModelConfig
from duoserve.engine import Engine
from duoserve.errors import ConfigError
from duoserve.experts.budget import MemoryPlan, plan_memory
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.host_ram import available_bytes
from duoserve.experts.pack_format import DTYPES, HEADER_FILE
from duoserve.experts.packing import CheckpointStore, pack_path, write_pack
from duoserve.experts.slots import SlotPool, SlotTable
from duoserve.experts.store import ExpertStore, HostStore, TieredStore
from duoserve.kv_cache import PagedKVCache, kv_bytes_per_token
from duoserve.metrics import Meter
from duoserve.models.opened import OpenedModel, opened
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.text import Text

# Activations, float32 copies of a block of weights, and what the allocator keeps between passes.
WORKSPACE_BYTES = 64 << 20
# A context worth having by default; a model's own maximum may cost more memory than its experts.
DEFAULT_MAX_CONTEXT = 4096


@dataclass(frozen=True)
class Runtime:
    """A loaded model and all that it holds open."""

    config: ModelConfig
    plan: MemoryPlan
    policy: Policy
    text: Text | None
    engine: Engine
    meter: Meter
    _held: ExitStack

    def close(self) -> None:
        """Stops the copies, then closes the files, in the reverse order of opening."""
        self._held.close()


def load(model: str | Path, wanted: EngineConfig, policy: str | Policy, cache_dir: str | Path | None) -> Runtime:
    """Opens a checkpoint and makes it ready to run; whatever was opened is closed again when that fails."""
    _check_device(wanted.device)
    named = _named_policy(policy)
    with ExitStack() as held:
        found = held.enter_context(opened(model))
        dtype = _dtype(wanted.dtype, found.config)
        max_context = wanted.max_context or min(found.config.max_position_embeddings, DEFAULT_MAX_CONTEXT)
        plan = _plan(found, wanted, dtype, max_context, needs_all=named is not None and named.all_resident)
        chosen = named or get_policy("resident" if plan.num_slots == plan.total_experts else "lru")
        store = _slow_tier(found, plan, dtype, cache_dir, held)
        meter, pool = Meter(), SlotPool(plan.num_slots, store.layout)
        copies = ThreadedCopyEngine(store, pool, wanted.copy_threads, on_copied=meter.copied)
        scheduler = held.enter_context(closing(make_scheduler(found.config, pool, copies, chosen, meter)))
        if chosen.all_resident:
            scheduler.load_all(progress=sys.stderr.isatty())
        read = partial(found.checkpoint.read, dtype=dtype)
        transformer = found.family.build(found.config, read, scheduler, pool.weights)
        engine = Engine(transformer, found.config, scheduler, PagedKVCache(found.config, max_context, dtype), meter)
        text = Text.load(found.checkpoint.folder)
        return Runtime(found.config, plan, chosen, text, engine, meter, held.pop_all())


def make_scheduler(config: ModelConfig, pool: SlotPool, copies: CopyEngine, policy: Policy, meter: Meter) -> Scheduler:
    """A scheduler over an empty pool."""
    return Scheduler(
        table=SlotTable(config.num_layers, config.num_experts, pool.num_slots),
        pool=pool,
        engine=copies,
        policy=policy,
        top_k=config.top_k,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        meter=meter,
    )


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device={device!r} is not supported yet: use 'cpu' or 'auto'")


def _named_policy(policy: str | Policy) -> Policy | None:
    """The policy that was asked for, None for "auto"."""
    if isinstance(policy, Policy):
        return policy
    return None if policy == "auto" else get_policy(policy)


def _dtype(name: str, config: ModelConfig) -> torch.dtype:
    if name == "auto":
        return config.dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not supported: use 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _plan(
    found: OpenedModel, wanted: EngineConfig, dtype: torch.dtype, max_context: int, needs_all: bool
) -> MemoryPlan:
    config = found.config
    return plan_memory(
        layout=found.layout(dtype),
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        dense_bytes=found.dense_bytes(dtype),
        kv_bytes=PagedKVCache.whole_pages(max_context) * kv_bytes_per_token(config, dtype),
        workspace_bytes=WORKSPACE_BYTES,
        wanted=wanted,
        available_bytes=available_bytes(),
        needs_all=needs_all,
    )


def _slow_tier(
    found: OpenedModel, plan: MemoryPlan, dtype: torch.dtype, cache_dir: str | Path | None, held: ExitStack
) -> ExpertStore:
    """Where experts wait: the checkpoint itself when each is read but once, else RAM, else the pack on disk."""
    source = CheckpointStore(found.checkpoint, found.layout(dtype), found.family.expert_names)
    if plan.num_slots == plan.total_experts:
        return source
    if plan.host_experts == plan.total_experts:
        return HostStore(source, found.experts, progress=sys.stderr.isatty())
    disk = held.enter_context(closing(_open_pack(source, found, cache_dir)))
    if plan.host_experts == 0:
        return disk
    return TieredStore(HostStore(disk, found.experts[: plan.host_experts], progress=sys.stderr.isatty()), disk)


def _open_pack(source: CheckpointStore, found: OpenedModel, cache_dir: str | Path | None) -> DiskStore:
    """The checkpoint's pack, which is made on first use."""
    folder = pack_path(found.checkpoint, source.layout, cache_dir)
    fingerprint = source.fingerprint()
    if not (folder / HEADER_FILE).exists():
        write_pack(source, found.experts, folder, fingerprint)
    return DiskStore(folder, source.layout, found.config.num_layers, found.config.num_experts, fingerprint)
