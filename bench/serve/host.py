"""Where a model is served: what differs between a GPU and a CPU, on which the bench is tried out."""

from __future__ import annotations

import ctypes
import gc
import time
from typing import Any, Protocol

import torch

from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.cuda_streams import CudaStreams
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.kernels.cuda_graphs import CudaRecorder
from duoserve.metrics import Meter
from gpu.ceilings import gpu_facts, measure_ceilings
from gpu.copy_machines import HostCopies
from gpu.copy_table import Way
from serve.steps import TimedRecorder

COPY_THREADS = 2
NVML, NVML_OK = "libnvidia-ml.so.1", 0


class Host(Protocol):
    """A machine that serves."""

    device: torch.device
    pins: bool  # whether page-locked memory means anything here

    def facts(self) -> dict[str, Any] | None:
        """Of the GPU."""
        ...

    def ceilings(self, slot_bytes: int) -> dict[str, float]:
        """``link_bytes_per_s``, ``memory_bytes_per_s`` and ``flop_per_s``."""
        ...

    def copy_engine(self, store: ExpertStore, pool: SlotPool, meter: Meter, piece_bytes: int) -> CopyEngine:
        """What fills the slots."""
        ...

    def recorder(self) -> TimedRecorder:
        """What records decode steps, where some are recorded."""
        ...

    def reset_peak(self) -> int:
        """Counts the peak from now on; the bytes that are held now."""
        ...

    def peak_bytes(self) -> int | None:
        """The most bytes that were held on the device since then; None where nobody counts."""
        ...

    def joules(self) -> float | None:
        """Energy that the device has used since it was switched on; None where it cannot be asked."""
        ...


class GpuHost(Host):
    """The current CUDA device."""

    pins = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._energy = EnergyCounter.of(self.device)

    def facts(self) -> dict[str, Any]:
        """As in Host."""
        return gpu_facts()

    def ceilings(self, slot_bytes: int) -> dict[str, float]:
        """As in Host; bytes that a copy in device memory reads and writes both count."""
        found = measure_ceilings(slot_bytes)
        return {
            "link_bytes_per_s": found["link_bytes_per_s"],
            "memory_bytes_per_s": found["copy_bytes_per_s"],
            "flop_per_s": found["matmul_flop_per_s"],
        }

    def copy_engine(self, store: ExpertStore, pool: SlotPool, meter: Meter, piece_bytes: int) -> CopyEngine:
        """As in Host: the engine that ``from_pretrained`` uses on a GPU."""
        return StreamCopyEngine(
            store,
            pool,
            CudaStreams(self.device),
            num_threads=COPY_THREADS,
            piece_bytes=piece_bytes,
            pinned=True,
            on_copied=meter.copied,
            on_stalled=meter.stalled,
        )

    def recorder(self) -> TimedRecorder:
        """As in Host."""
        return TimedRecorder(CudaRecorder(self.device), CudaStreams(self.device))

    def reset_peak(self) -> int:
        """As in Host."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def peak_bytes(self) -> int:
        """As in Host."""
        return int(torch.cuda.memory_stats()["allocated_bytes.all.peak"])

    def joules(self) -> float | None:
        """As in Host."""
        return self._energy and self._energy.joules()


class CpuHost(Host):
    """The host itself, whose slots are RAM too: for trying the bench out."""

    device = torch.device("cpu")
    pins = False

    def facts(self) -> None:
        """As in Host."""

    def ceilings(self, slot_bytes: int) -> dict[str, float]:
        """As in Host, roughly."""
        copy_s = min(HostCopies().seconds(Way.TO_DEVICE, max(slot_bytes, 1 << 20)))
        rate = max(slot_bytes, 1 << 20) / copy_s
        a = torch.randn(256, 256)
        began = time.perf_counter()
        for _ in range(8):
            torch.mm(a, a)
        flop_per_s = 8 * 2 * 256**3 / (time.perf_counter() - began)
        return {"link_bytes_per_s": rate, "memory_bytes_per_s": 2 * rate, "flop_per_s": flop_per_s}

    def copy_engine(self, store: ExpertStore, pool: SlotPool, meter: Meter, piece_bytes: int) -> CopyEngine:
        """As in Host; a thread reads a row whole, whatever ``piece_bytes``."""
        return ThreadedCopyEngine(store, pool, COPY_THREADS, on_copied=meter.copied)

    def recorder(self) -> TimedRecorder:
        """Never: a CPU records no steps."""
        raise NotImplementedError("a CPU records no steps")

    def reset_peak(self) -> int:
        """As in Host."""
        gc.collect()
        return 0

    def peak_bytes(self) -> None:
        """As in Host: RAM is not counted by what is held for which purpose."""

    def joules(self) -> None:
        """As in Host."""


class EnergyCounter:
    """NVML's count of the energy that a GPU has used; it is only asked, never told."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._library = library
        self._handle = handle

    @classmethod
    def of(cls, device: torch.device) -> EnergyCounter | None:
        """The device's, None where NVML or the counter is not there."""
        try:
            library = ctypes.CDLL(NVML)
        except OSError:
            return None
        handle, name = ctypes.c_void_p(), f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        found = library.nvmlInit_v2() == NVML_OK
        found = found and library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == NVML_OK
        counter = cls(library, handle) if found else None
        return counter if counter and counter.joules() is not None else None

    def joules(self) -> float | None:
        """Since the driver was loaded; None where the GPU has no such counter."""
        millijoules = ctypes.c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3 if status == NVML_OK else None
