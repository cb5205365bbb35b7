"""Fakes that tests of every floor share: experts made up in memory, with faults and delays on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pack_format import HEADER_FILE, PACK_FILE, PackHeader
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore

PATIENCE_S = 10.0  # how long a test waits for another thread before it fails; never spent when all is well
SMALL = ExpertLayout(torch.bfloat16, hidden=64, intermediate=32)  # slot_bytes is 12288, three pages


class Gate:
    """Holds a thread up: ``entered`` is set when it arrives, and it goes on after ``open()``."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._opened = threading.Event()

    def wait_entered(self) -> None:
        """Blocks the test until the thread has arrived."""
        assert self.entered.wait(PATIENCE_S), "nobody came to the gate"

    def open(self) -> None:
        """Lets everybody through, from now on."""
        self._opened.set()

    def pass_through(self) -> None:
        """What the thread that is held up calls."""
        self.entered.set()
        assert self._opened.wait(PATIENCE_S), "the test never opened the gate"


class ArrayStore(ExpertStore):
    """Experts with random finite weights in memory, all different, the same for the same seed.

    Reads of the experts in ``fail_on`` fail, as do the reads whose number (from 0, in order of arrival) is in
    ``fail_reads``; the row is half written by then. ``error`` makes what they raise. ``reads`` lists all reads so far.
    """

    def __init__(
        self,
        layout: ExpertLayout = SMALL,
        num_layers: int = 2,
        num_experts: int = 4,
        *,
        seed: int = 0,
        fail_on: Collection[ExpertId] = (),
        fail_reads: Collection[int] = (),
        error: Callable[[], BaseException] = lambda: OSError(5, "injected"),
    ) -> None:
        self.layout = layout
        self.experts = [ExpertId(layer, e) for layer in range(num_layers) for e in range(num_experts)]
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.fail_on = set(fail_on)
        self.fail_reads = set(fail_reads)
        self.reads: list[ExpertId] = []
        self.closed = False
        self._error = error
        self._gates: dict[ExpertId, Gate] = {}
        self._lock = threading.Lock()
        self._rows_NB = _random_rows(layout, len(self.experts), seed)

    def row(self, expert: ExpertId) -> Tensor:
        """The bytes that a read of this expert must give: uint8 [slot_bytes]."""
        return self._rows_NB[expert.layer * self.num_experts + expert.expert]

    def weights(self, expert: ExpertId) -> tuple[Tensor, Tensor]:
        """w13 [2I, H] and w2 [H, I] of this expert."""
        weights = self.layout.weights(self._rows_NB)
        index = expert.layer * self.num_experts + expert.expert
        return weights.w13_SNH[index], weights.w2_SHI[index]

    def gate(self, expert: ExpertId) -> Gate:
        """Makes reads of this expert wait at the gate."""
        return self._gates.setdefault(expert, Gate())

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        with self._lock:
            number = len(self.reads)
            self.reads.append(expert)
        if expert in self._gates:
            self._gates[expert].pass_through()
        if expert in self.fail_on or number in self.fail_reads:
            half = self.layout.slot_bytes // 2
            row_B[:half] = self.row(expert)[:half]
            raise self._error()
        row_B.copy_(self.row(expert))

    def close(self) -> None:
        self.closed = True


class InRam(ArrayStore):
    """The same experts; who copies may read their rows where they lie."""

    def host_row(self, expert: ExpertId) -> Tensor:
        return self.row(expert)


def save_pack(store: ArrayStore, folder: Path, fingerprint: str = "f" * 64) -> Path:
    """A pack of all experts of ``store`` in ``folder``, written plainly; returns ``folder``."""
    header = PackHeader.for_layout(store.layout, store.num_layers, store.num_experts, fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER_FILE).write_text(json.dumps(header.to_dict()))
    (folder / PACK_FILE).write_bytes(b"".join(store.row(expert).numpy().tobytes() for expert in store.experts))
    return folder


def _random_rows(layout: ExpertLayout, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_NB = aligned_rows(count, layout.slot_bytes)
    weights = layout.weights(rows_NB)
    for values in (weights.w13_SNH, weights.w2_SHI):
        # Scaled so that an expert's output is about as large as its input.
        values.copy_(torch.randn(values.shape, generator=generator) * values.shape[-1] ** -0.5)
    return rows_NB
