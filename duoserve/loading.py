"""From a checkpoint to a running engine: check, plan the memory, place the weights, wire the floors together."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from duoserve.config import EngineConfig, ModelConfig
from duoserve.engine import Engine
from duoserve.errors import ConfigError
from duoserve.experts.budget import MemoryPlan, parse_bytes, plan_memory
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.host_ram import available_bytes
from duoserve.experts.hub import resolve
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pack_format import HEADER_FILE
from duoserve.experts.packing import CheckpointStore, pack_path, write_pack
from duoserve.experts.slots import SlotPool, SlotTable
from duoserve.experts.store import ExpertStore, HostStore, TieredStore
from duoserve.kv_cache import PagedKVCache, kv_bytes_per_token
from duoserve.metrics import Meter
from duoserve.models.registry import Family, family_of
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.text import Text

# Activations, float32 copies of a block of weights, and what the allocator keeps between passes.
WORKSPACE_BYTES = 64 << 20
# A context worth having by default; a model's own maximum may cost more memory than its experts.
DEFAULT_MAX_CONTEXT = 4096

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Runtime:
    """A loaded model and all that it holds open."""

    config: ModelConfig
    plan: MemoryPlan
    policy: Policy
    text: Text | None
    engine: Engine
    meter: Meter
    _open: ExitStack

    def close(self) -> None:
        """Stops the copies, then closes the files, in the reverse order of opening."""
        self._open.close()


def engine_config(
    *,
    device: str,
    dtype: str,
    expert_memory: int | str | None,
    expert_slots: int | str | None,
    memory: int | str | None,
    host_memory: int | str,
    max_context: int | None,
    copy_threads: int,
) -> EngineConfig:
    """The options of ``from_pretrained``, with text such as "4GiB" turned into bytes; ConfigError for nonsense."""

    def in_bytes(value: int | str | None) -> int | None:
        return None if value is None else parse_bytes(value)

    return EngineConfig(
        device=device,
        dtype=dtype,
        expert_memory=in_bytes(expert_memory),
        expert_slots=expert_slots,
        memory=in_bytes(memory),
        host_memory=None if host_memory == "auto" else in_bytes(host_memory),
        max_context=max_context,
        copy_threads=copy_threads,
    )


def load(model: str | Path, wanted: EngineConfig, policy: str | Policy, cache_dir: str | Path | None) -> Runtime:
    """Opens a checkpoint and makes it ready to run; whatever was opened is closed again when that fails."""
    _check_device(wanted.device)
    with ExitStack() as opened:
        checkpoint = opened.enter_context(closing(Checkpoint.open(resolve(model))))
        family = family_of(checkpoint.config)
        config = family.parse_config(checkpoint.config)
        checkpoint.check(family.tensor_shapes(config))
        dtype = _dtype(wanted.dtype, config)
        layout = ExpertLayout(dtype, config.hidden_size, config.expert_intermediate_size)
        max_context = wanted.max_context or min(config.max_position_embeddings, DEFAULT_MAX_CONTEXT)
        plan = plan_memory(
            layout=layout,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
            dense_bytes=_dense_bytes(family, config, dtype),
            kv_bytes=max_context * kv_bytes_per_token(config, dtype),
            workspace_bytes=WORKSPACE_BYTES,
            wanted=wanted,
            available_bytes=available_bytes(),
            needs_all=policy == "resident",
        )
        chosen = _choose_policy(policy, plan, config)
        source = CheckpointStore(checkpoint, layout, family.expert_names)
        store = _slow_tier(source, plan, config, pack_path(checkpoint, layout, cache_dir), opened)
        meter = Meter()
        pool = SlotPool(plan.num_slots, layout)
        copies = opened.enter_context(
            closing(ThreadedCopyEngine(store, pool, wanted.copy_threads, on_copied=meter.copied))
        )
        scheduler = make_scheduler(config, pool, copies, chosen, meter)
        opened.callback(scheduler.close)
        if chosen.all_resident:
            scheduler.load_all(progress=True)
        transformer = family.build(config, lambda name: checkpoint.read(name, dtype), scheduler, pool.weights)
        engine = Engine(transformer, config, scheduler, PagedKVCache(config, max_context, dtype), meter)
        text = Text.load(checkpoint.folder)
        return Runtime(config, plan, chosen, text, engine, meter, opened.pop_all())


def make_scheduler(
    config: ModelConfig, pool: SlotPool, copies: CopyEngine, policy: Policy, meter: Meter
) -> Scheduler:
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


def _dtype(name: str, config: ModelConfig) -> torch.dtype:
    if name == "auto":
        return config.dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not supported: use 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _dense_bytes(family: Family, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of everything that is not a routed expert."""
    elements = sum(prod(shape) for shape in family.tensor_shapes(config).values())
    per_expert = 3 * config.hidden_size * config.expert_intermediate_size
    return (elements - per_expert * config.num_layers * config.num_experts) * dtype.itemsize


def _choose_policy(policy: str | Policy, plan: MemoryPlan, config: ModelConfig) -> Policy:
    if isinstance(policy, Policy):
        return policy
    fits = plan.num_slots == config.num_layers * config.num_experts
    return get_policy(("resident" if fits else "lru") if policy == "auto" else policy)


def _slow_tier(
    source: CheckpointStore, plan: MemoryPlan, config: ModelConfig, pack: Path, opened: ExitStack
) -> ExpertStore:
    """Where experts wait: the checkpoint itself when each is read but once, else RAM, else the pack on disk."""
    experts = [ExpertId(layer, e) for layer in range(config.num_layers) for e in range(config.num_experts)]
    if plan.num_slots == len(experts):
        return source
    if plan.host_experts >= len(experts):
        return HostStore(source, experts, progress=True)
    fingerprint = source.fingerprint()
    if not (pack / HEADER_FILE).exists():
        write_pack(source, experts, pack, fingerprint)
    disk = DiskStore(pack, layout=source.layout, num_layers=config.num_layers, num_experts=config.num_experts, fingerprint=fingerprint)
    opened.callback(disk.close)
    if plan.host_experts == 0:
        return disk
    return TieredStore(HostStore(disk, experts[: plan.host_experts], progress=True), disk)
