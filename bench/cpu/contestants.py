"""Who takes part in the CPU bench, and how each is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu import rows as cpu_rows
from harness import Worker, as_module
from shapes import Shape

COPY_THREADS = 1  # of ours: one that reads has the disk's rate
MODULES = {
    "duoserve": ("cpu.ours",),
    "transformers": ("cpu.peers", "transformers"),
    "accelerate": ("cpu.peers", "accelerate"),
    "xllamacpp": ("cpu.llama_peer",),
}


@dataclass(frozen=True)
class Contestant:
    """One engine as it is set up; ``cold``: the page cache of its files is dropped before every token.

    ``capped``: it runs in a group of its own with the shape's limit of memory.
    """

    name: str
    kind: str
    options: dict[str, Any]
    cold: bool = False
    capped: bool = False


@dataclass
class Run:
    """What one run measures and where its files are; ``scratch`` lies on the checkpoint's disk.

    ``cap_bytes`` limit the memory of those that are capped, None where this process may not limit it.
    ``without`` names contestants that are left out. ``token_ids`` are what the first engine to answer chose, and
    ``routing`` [L][T][K] how these tokens route.
    """

    shape: Shape
    folder: Path
    scratch: Path
    threads: int
    rounds: int
    engines: tuple[str, ...]
    prompt: list[int]
    cap_bytes: int | None
    without: frozenset[str] = frozenset()
    token_ids: list[int] | None = None
    routing: list[list[list[int]]] | None = None

    @property
    def packs(self) -> Path:
        """Where duoserve keeps its packed experts."""
        return self.folder.with_name(self.folder.name + "-packs")

    @property
    def predictor(self) -> Path:
        """Where the predictor of our policy is, once it has been trained."""
        return self.scratch / "predictor.safetensors"

    def has(self, contestant: Contestant) -> bool:
        """Whether it takes part. llama.cpp from disk is nothing without a limit: the cache would hold its file."""
        limited = self.cap_bytes is not None or contestant.name != cpu_rows.LLAMA_DISK
        return contestant.kind in self.engines and limited and contestant.name not in self.without

    def caps(self, contestant: Contestant) -> bool:
        """Whether its memory is limited."""
        return contestant.capped and self.cap_bytes is not None

    def worker(self, name: str, *command: str) -> Worker:
        """A new process that runs a module of bench/, with the words behind it."""
        return Worker(name, as_module(*command), {"OMP_NUM_THREADS": str(self.threads)})

    def llama_options(self, kind: str) -> dict[str, Any]:
        """What ``LlamaCpp.load`` takes."""
        gguf = self.scratch / f"{kind}.gguf"
        return {"gguf": str(gguf), "kind": kind, "max_context": self.shape.max_context}

    def duoserve_options(self, policy: str, slots: int) -> dict[str, Any]:
        """What ``Duoserve.load`` takes."""
        return {
            "policy": policy,
            "expert_slots": slots,
            "max_context": self.shape.max_context,
            "copy_threads": COPY_THREADS,
            "cache": str(self.packs),
        }


def resident_contestants(run: Run) -> list[Contestant]:
    """All weights in RAM; float32 takes twice the memory, is the reference for the logits, and no rival of bf16."""
    ours = run.duoserve_options("resident", run.shape.num_experts)
    return [
        Contestant(cpu_rows.OURS, "duoserve", ours),
        *(
            Contestant(name, "duoserve", ours | {"quantize": quantize, "decode_mode": "compiled"})
            for quantize, name in cpu_rows.OURS_QUANTIZED.items()
        ),
        Contestant(cpu_rows.COMPILED, "duoserve", ours | {"decode_mode": "compiled"}),
        Contestant(cpu_rows.BF12, "duoserve", ours | {"decode_mode": "compiled", "quantize": "bf12"}),
        *(
            Contestant(name, "xllamacpp", run.llama_options(kind))
            for name, kind in ((cpu_rows.LLAMA, "bf16"), (cpu_rows.LLAMA_Q8, "q8_0"), (cpu_rows.LLAMA_Q4, "q4_0"))
        ),
        *(
            Contestant(f"transformers {way}", "transformers", {"implementation": way})
            for way in ("grouped_mm", "eager")
        ),
        Contestant(cpu_rows.REFERENCE, "transformers", {"implementation": "grouped_mm", "dtype": "float32"}),
    ]


def our_policies(run: Run) -> list[Contestant]:
    """Those that take part: from disk as users have it, once ``run.predictor`` is there."""
    shape = run.shape
    in_equal_memory = shape.quarter * shape.slot_bytes // shape.bf12_slot_bytes
    told = {"predictor": str(run.predictor), "decode_mode": "compiled"}

    def ours(name: str, slots: int, quantize: str | None) -> Contestant:
        options = run.duoserve_options("duoserve", slots) | told | {"quantize": quantize}
        return Contestant(name, "duoserve", options, cold=True, capped=True)

    policies = [
        ours(cpu_rows.OURS_POLICY, shape.quarter, None),
        ours(cpu_rows.BF12_POLICY, shape.quarter, "bf12"),
        ours(cpu_rows.BF12_EQUAL, in_equal_memory, "bf12"),
    ]
    return [policy for policy in policies if run.has(policy)]


def disk_contestants(run: Run) -> list[Contestant]:
    """Experts on disk: ours with a quarter in slots, accelerate's with none in RAM and with a quarter (by layers).

    llama.cpp maps its file, and the limit of its memory, which is ours too, decides how much of it stays in RAM.
    """

    def ours(name: str) -> Contestant:
        options = run.duoserve_options(name.removeprefix("duoserve "), run.shape.quarter)
        return Contestant(name, "duoserve", options, cold=True, capped=True)

    def accelerate(name: str, resident_layers: int, cold: bool) -> Contestant:
        offload = str(run.scratch / name.replace(" ", "-"))  # one each: dropping its cache must not cool another's
        options = {"implementation": "grouped_mm", "offload": offload, "resident_layers": resident_layers}
        return Contestant(name, "accelerate", options, cold)

    return [
        ours(cpu_rows.OURS_DISK),
        *our_policies(run),
        Contestant(cpu_rows.LLAMA_DISK, "xllamacpp", run.llama_options("bf16"), cold=True, capped=True),
        accelerate(cpu_rows.PEER_DISK, 0, cold=True),
        accelerate(cpu_rows.PEER_DISK_EQUAL, run.shape.layers // 4, cold=True),
        accelerate(cpu_rows.PEER_DISK_WARM, 0, cold=False),
        ours(cpu_rows.ON_DEMAND),
        ours(cpu_rows.LAYER_PREFETCH),
    ]
