"""What of a model goes where: on which device, in which dtype, and where the experts wait that have no slot."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from duoserve.callers import warn_caller
from duoserve.config import EngineConfig
from duoserve.errors import ConfigError
from duoserve.experts.budget import FreeMemory, MemoryPlan
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.cuda_streams import CudaStreams
from duoserve.experts.device import CPU, free_bytes, resolve_device
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.pack_folder import is_current, is_out_of_reach, pack_path
from duoserve.experts.packing import write_pack
from duoserve.experts.rows import DenseMemory
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore, HostStore, TieredStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.kernels import tiles_keep_bits
from duoserve.loading.memory_needs import MemoryNeeds, context_of
from duoserve.metrics import Meter
from duoserve.models.gpu_support import cpu_only
from duoserve.models.opened import OpenedModel
from duoserve.models.tensors import ReadTensor
from duoserve.scheduling.policies import Policy


@dataclass(frozen=True)
class Placement:
    """A model, the device that computes it, the dtype of its weights, and the tokens that its KV cache holds."""

    model: OpenedModel
    device: torch.device
    dtype: torch.dtype
    max_context: int

    @classmethod
    def of(cls, model: OpenedModel, wanted: EngineConfig) -> Placement:
        """The placement that ``wanted`` asks for; what it leaves open is chosen to suit the machine and the model.

        Raises ConfigError for a device or dtype that cannot be had.
        """
        device, only_cpu = resolve_device(wanted.device), cpu_only(model.config)
        if device.type != "cpu" and only_cpu is not None:
            raise ConfigError(f"{only_cpu} runs on CPUs only so far: load it with device='cpu'")
        if wanted.invariant:
            _check_invariance(device)
        return cls(model, device, model.dtype(wanted.dtype), context_of(model.config, wanted.max_context))

    def plan(self, wanted: EngineConfig, policy: Policy | None) -> MemoryPlan:
        """How memory is divided under ``policy``, or under one that suits it; MemoryBudgetError if it cannot work."""
        needs = MemoryNeeds(
            config=self.model.config,
            layout=self.model.layout(self.dtype, wanted.quantize),
            dense_bytes=self.model.dense_bytes(self.dtype),
            dtype=self.dtype,
            device=self.device,
            max_context=self.max_context,
        )
        free = FreeMemory(free_bytes(self.device), free_bytes(CPU) if self._on_gpu else None)
        if policy is None:
            return needs.plan(wanted, free)
        return needs.plan(wanted, free, needs_all=policy.all_resident, keeps=policy.keeps)

    def dense_reader(self) -> ReadTensor:
        """Reads each dense tensor once, by its name in the checkpoint, in a dtype or the model's."""
        memory = DenseMemory([] if self._on_gpu else self.model.family.dense_sizes(self.model.config, self.dtype))

        def read(name: str, dtype: torch.dtype | None = None) -> Tensor:
            return memory.keep(self.model.read(name, dtype or self.dtype)).to(self.device)

        return read

    def slow_tier(
        self, plan: MemoryPlan, cache_dir: str | Path | None, resources: ExitStack, quantize: str | None
    ) -> ExpertStore:
        """Where experts wait: the checkpoint itself when each is read but once, else RAM, else the pack on disk."""
        model = self.model
        in_ram = partial(HostStore, progress=sys.stderr.isatty(), pinned=self._on_gpu)
        source = model.expert_store(self.dtype, quantize)
        if plan.read_once:
            return source
        if plan.all_in_ram:
            return resources.enter_context(closing(in_ram(source, model.experts)))
        disk = resources.enter_context(closing(_open_pack(source, model, cache_dir)))
        if plan.host_experts == 0:
            return disk
        return resources.enter_context(closing(TieredStore(in_ram(disk, model.experts[: plan.host_experts]), disk)))

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


def _check_invariance(device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError(f"invariant=True is for CPUs so far, but the device is {device}: load with device='cpu'")
    num_threads = torch.get_num_threads()
    if not tiles_keep_bits(num_threads):
        raise ConfigError(
            f"invariant=True cannot be had: float32 products by {num_threads} threads change a row's bits with others "
            "on this machine; fewer threads (OMP_NUM_THREADS) may not"
        )


def _open_pack(source: ExpertStore, model: OpenedModel, cache_dir: str | Path | None) -> DiskStore:
    """The checkpoint's pack, which is made on first use, and again when the checkpoint's files have changed.

    If a pack is older than these files but may not be replaced, it is used as it is, with a warning: the files may be
    a copy of the checkpoint that it was made from, which is newer than the pack without being different.
    """
    folder = pack_path(model.checkpoint, source.layout, cache_dir)
    fingerprint, changed_ns = model.checkpoint.fingerprint(), model.checkpoint.changed_ns
    if not is_current(folder, changed_ns):
        if is_out_of_reach(folder):
            warn_caller(f"{folder} is older than {model.checkpoint.folder}, and may not be made again")
        else:
            write_pack(source, model.experts, folder, fingerprint, changed_ns=changed_ns)
    return DiskStore(folder, source.layout, model.pack_layers, model.config.num_experts, fingerprint)
