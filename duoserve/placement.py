"""What of a model goes where: on which device, in which dtype, and where the experts wait that have no slot."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from duoserve.config import EngineConfig, ModelConfig
from duoserve.errors import ConfigError
from duoserve.experts.budget import MemoryPlan, plan_memory
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.cuda_streams import CudaStreams
from duoserve.experts.device import CPU, free_bytes, resolve
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.pack_format import DTYPES, HEADER_FILE
from duoserve.experts.packing import pack_path, write_pack
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore, HostStore, TieredStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.kv_cache import PagedKVCache, kv_bytes_per_token
from duoserve.metrics import Meter
from duoserve.models.opened import OpenedModel
from duoserve.workspace import workspace_bytes

# A context worth having by default; a model's own maximum may cost more memory than its experts.
DEFAULT_MAX_CONTEXT = 4096


@dataclass(frozen=True)
class Placement:
    """A model, the device that computes it, the dtype of its weights, and the tokens that its KV cache holds."""

    found: OpenedModel
    device: torch.device
    dtype: torch.dtype
    max_context: int

    @classmethod
    def of(cls, found: OpenedModel, wanted: EngineConfig) -> Placement:
        """As ``wanted``, where it says so; ConfigError for a device or dtype that cannot be had."""
        max_context = wanted.max_context or min(found.config.max_position_embeddings, DEFAULT_MAX_CONTEXT)
        device = resolve(wanted.device)
        if device.type != "cpu" and found.config.blocks.moe.clamp:
            raise ConfigError(f"{found.config.model_type} runs on CPUs only so far: load it with device='cpu'")
        quantization = found.config.quantization
        if device.type != "cpu" and quantization is not None and quantization.ordered:
            raise ConfigError(f"{quantization} runs on CPUs only so far: load it with device='cpu'")
        return cls(found, device, _dtype(wanted.dtype, found.config), max_context)

    def plan(self, wanted: EngineConfig, needs_all: bool) -> MemoryPlan:
        """How memory is divided; MemoryBudgetError when it cannot work."""
        config, context = self.found.config, PagedKVCache.whole_pages(self.max_context)
        return plan_memory(
            layout=self.found.layout(self.dtype, wanted.quantize),
            num_layers=len(config.moe_layers),
            num_experts=config.num_experts,
            top_k=config.top_k,
            dense_bytes=self.found.dense_bytes(self.dtype),
            kv_bytes=context * kv_bytes_per_token(config, self.dtype),
            workspace_bytes=workspace_bytes(config, self.dtype, self.device, context),
            wanted=wanted,
            available_bytes=free_bytes(self.device),
            host_available_bytes=free_bytes(CPU) if self._on_gpu else None,
            needs_all=needs_all,
        )

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A dense tensor by its name in the checkpoint, in ``dtype`` or the model's."""
        return self.found.read(name, dtype or self.dtype).to(self.device)

    def slow_tier(
        self, plan: MemoryPlan, cache_dir: str | Path | None, held: ExitStack, quantize: str | None = None
    ) -> ExpertStore:
        """Where experts wait: the checkpoint itself when each is read but once, else RAM, else the pack on disk."""
        found = self.found
        in_ram = partial(HostStore, progress=sys.stderr.isatty(), pinned=self._on_gpu)
        source = found.expert_store(self.dtype) if quantize is None else found.quantizing_store(quantize)
        if plan.num_slots == plan.total_experts:
            return source
        if plan.host_experts == plan.total_experts:
            return held.enter_context(closing(in_ram(source, found.experts)))
        disk = held.enter_context(closing(_open_pack(source, found, cache_dir)))
        if plan.host_experts == 0:
            return disk
        return held.enter_context(closing(TieredStore(in_ram(disk, found.experts[: plan.host_experts]), disk)))

    def copy_engine(self, store: ExpertStore, pool: SlotPool, num_threads: int, meter: Meter) -> CopyEngine:
        """Threads that read into RAM, or the copy lanes of a GPU."""
        if not self._on_gpu:
            return ThreadedCopyEngine(store, pool, num_threads, on_copied=meter.copied)
        return StreamCopyEngine(
            store,
            pool,
            CudaStreams(self.device),
            num_threads=num_threads,
            pinned=True,
            on_copied=meter.copied,
            on_stalled=meter.stalled,
        )

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"


def _dtype(name: str, config: ModelConfig) -> torch.dtype:
    if name == "auto":
        return config.dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not supported: use 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _open_pack(source: ExpertStore, found: OpenedModel, cache_dir: str | Path | None) -> DiskStore:
    """The checkpoint's pack, which is made on first use."""
    folder = pack_path(found.checkpoint, source.layout, cache_dir)
    fingerprint = found.checkpoint.fingerprint()
    if not (folder / HEADER_FILE).exists():
        write_pack(source, found.experts, folder, fingerprint)
    return DiskStore(folder, source.layout, found.pack_layers, found.config.num_experts, fingerprint)
