"""From a checkpoint to a running engine: check, plan the memory, place the weights, wire the floors together."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from duoserve.config import EngineConfig, ModelConfig
from duoserve.engine import Engine
from duoserve.errors import ConfigError
from duoserve.experts.budget import MemoryPlan, plan_memory
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.host_ram import available_bytes
from duoserve.experts.hub import resolve
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pack_format import DTYPES, HEADER_FILE
from duoserve.experts.packing import CheckpointStore, pack_path, write_pack
from duoserve.experts.slots import SlotPool, SlotTable
from duoserve.experts.store import ExpertStore, HostStore, TieredStore
from duoserve.experts.strict_json import read_object
from duoserve.kv_cache import PagedKVCache, kv_bytes_per_token
from duoserve.metrics import Meter
from duoserve.models.config_fields import Fields
from duoserve.models.registry import Family, family_of
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.text import Text

# Activations, float32 copies of a block of weights, and what the allocator keeps between passes.
WORKSPACE_BYTES = 64 << 20
# A context worth having by default; a model's own maximum may cost more memory than its experts.
DEFAULT_MAX_CONTEXT = 4096
MAX_GENERATION_CONFIG_BYTES = 1 << 20
HEAD = "lm_head.weight"


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


@dataclass(frozen=True)
class _Model:
    """A checkpoint that has been checked, and how its experts will be packed."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    layout: ExpertLayout
    max_context: int

    @property
    def experts(self) -> list[ExpertId]:
        """All experts, layer by layer."""
        shape = self.config
        return [ExpertId(layer, expert) for layer in range(shape.num_layers) for expert in range(shape.num_experts)]

    def read(self, name: str) -> Tensor:
        """A dense tensor, in the dtype that is computed in."""
        return self.checkpoint.read(name, self.layout.dtype)


def load(model: str | Path, wanted: EngineConfig, policy: str | Policy, cache_dir: str | Path | None) -> Runtime:
    """Opens a checkpoint and makes it ready to run; whatever was opened is closed again when that fails."""
    _check_device(wanted.device)
    named = _named_policy(policy)
    with ExitStack() as opened:
        found = _inspect(opened.enter_context(closing(Checkpoint.open(resolve(model)))), wanted)
        plan = _plan(found, wanted, needs_all=named is not None and named.all_resident)
        chosen = named or get_policy("resident" if plan.num_slots == plan.total_experts else "lru")
        store = _slow_tier(found, plan, cache_dir, opened)
        meter, pool = Meter(), SlotPool(plan.num_slots, found.layout)
        copies = ThreadedCopyEngine(store, pool, wanted.copy_threads, on_copied=meter.copied)
        scheduler = opened.enter_context(closing(make_scheduler(found.config, pool, copies, chosen, meter)))
        if chosen.all_resident:
            scheduler.load_all(progress=sys.stderr.isatty())
        transformer = found.family.build(found.config, found.read, scheduler, pool.weights)
        cache = PagedKVCache(found.config, found.max_context, found.layout.dtype)
        engine = Engine(transformer, found.config, scheduler, cache, meter)
        text = Text.load(found.checkpoint.folder)
        return Runtime(found.config, plan, chosen, text, engine, meter, opened.pop_all())


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


def _inspect(checkpoint: Checkpoint, wanted: EngineConfig) -> _Model:
    """Reads the config and compares the tensors with what its architecture needs."""
    family = family_of(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    if HEAD in checkpoint.tensors:  # a head of its own is used even where the config calls it tied
        config = replace(config, tie_word_embeddings=False)
    checkpoint.check(family.tensor_shapes(config))
    layout = ExpertLayout(_dtype(wanted.dtype, config), config.hidden_size, config.expert_intermediate_size)
    max_context = wanted.max_context or min(config.max_position_embeddings, DEFAULT_MAX_CONTEXT)
    return _Model(checkpoint, family, _with_end_tokens(config, checkpoint.folder), layout, max_context)


def _with_end_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    """generation_config.json, where there is one, knows the tokens that end a text better than config.json."""
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    raw = read_object(path, MAX_GENERATION_CONFIG_BYTES)
    if raw.get("eos_token_id") is None:
        return config
    return replace(config, eos_token_ids=Fields(raw, where=path.name).token_ids("eos_token_id", 0))


def _dtype(name: str, config: ModelConfig) -> torch.dtype:
    if name == "auto":
        return config.dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not supported: use 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _plan(found: _Model, wanted: EngineConfig, needs_all: bool) -> MemoryPlan:
    config, dtype = found.config, found.layout.dtype
    return plan_memory(
        layout=found.layout,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        dense_bytes=_dense_bytes(found),
        kv_bytes=found.max_context * kv_bytes_per_token(config, dtype),
        workspace_bytes=WORKSPACE_BYTES,
        wanted=wanted,
        available_bytes=available_bytes(),
        needs_all=needs_all,
    )


def _dense_bytes(found: _Model) -> int:
    """Bytes of everything that is not a routed expert."""
    experts = {name for expert in found.experts for name in found.family.expert_names(expert)}
    shapes = found.family.tensor_shapes(found.config)
    return sum(prod(shape) for name, shape in shapes.items() if name not in experts) * found.layout.dtype.itemsize


def _slow_tier(found: _Model, plan: MemoryPlan, cache_dir: str | Path | None, opened: ExitStack) -> ExpertStore:
    """Where experts wait: the checkpoint itself when each is read but once, else RAM, else the pack on disk."""
    source = CheckpointStore(found.checkpoint, found.layout, found.family.expert_names)
    if plan.num_slots == plan.total_experts:
        return source
    if plan.host_experts == plan.total_experts:
        return HostStore(source, found.experts, progress=sys.stderr.isatty())
    disk = _open_pack(source, found, pack_path(found.checkpoint, found.layout, cache_dir))
    opened.callback(disk.close)
    if plan.host_experts == 0:
        return disk
    return TieredStore(HostStore(disk, found.experts[: plan.host_experts], progress=sys.stderr.isatty()), disk)


def _open_pack(source: CheckpointStore, found: _Model, folder: Path) -> DiskStore:
    """The checkpoint's pack, which is made on first use."""
    fingerprint = found.checkpoint.fingerprint()
    if not (folder / HEADER_FILE).exists():
        write_pack(source, found.experts, folder, fingerprint)
    return DiskStore(folder, source.layout, found.config.num_layers, found.config.num_experts, fingerprint)
