"""An engine whose decode steps are recorded, on a device that does everything as late as it may."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from duoserve.engine import Engine
from duoserve.experts.copy_engine import ThreadedCopyEngine
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore, HostStore, TieredStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.kv_cache import NewTokens
from duoserve.launching.event import event_steps
from duoserve.launching.graph import graph_steps
from duoserve.launching.launch import StepParts
from duoserve.launching.recorded import RecordedRunner
from duoserve.passes import StepRunner
from duoserve.request import Request
from tests.helpers.assembly import assembled
from tests.helpers.fake_recorder import FakeRecorder
from tests.helpers.fake_streams import FakeStreams, LaggingPool
from tests.helpers.toys import greedy


class LaggingDevice:
    """Decode steps are computed on its compute lane when their turn comes, prefills by the host at once.

    ``in_ram`` experts wait in RAM, the others on disk. ``logits`` are those of all decode steps.
    """

    def __init__(self, seed: int, in_ram: Sequence[ExpertId] = ()) -> None:
        self.streams = FakeStreams(random.Random(seed), host_computes=True)
        self.recorder = FakeRecorder(self.streams)
        self.in_ram = in_ram
        self.logits: list[Tensor] = []

    def pool(self, num_slots: int, layout: ExpertLayout) -> SlotPool:
        return LaggingPool(num_slots, layout, self.streams)

    def copies(self, store: ExpertStore, pool: SlotPool) -> StreamCopyEngine:
        self.store = TieredStore(HostStore(store, self.in_ram), store)
        return StreamCopyEngine(self.store, pool, self.streams, piece_bytes=pool.rows_SB.shape[1] // 3)

    def recorded(self, mode: str, record_after: int = 0) -> Callable[[StepParts], StepRunner]:
        """Makes runners of ``mode`` that record a shape when it comes for the time after ``record_after``."""

        def runner(parts: StepParts) -> StepRunner:
            if mode == "graph":
                books = parts.scheduler.read_through()
                steps = graph_steps(parts.model, parts.cache, self.recorder, self.store, books)
            else:
                steps = event_steps(parts.model, parts.cache, self.recorder)
            return self.lagging(RecordedRunner(parts.model, parts.cache, steps, record_after))

        return runner

    def lagging(self, decode: StepRunner) -> StepRunner:
        def step(new_tokens: NewTokens) -> Tensor:
            try:
                self.logits.append(decode(new_tokens).clone())
                return self.logits[-1]
            finally:
                self.streams.finish()
                self.streams.host_computes = True

        return step


def write(engine: Engine, prompts: Sequence[list[int]], max_tokens: Sequence[int]) -> list[list[int]]:
    """Greedy continuations in shared passes, of which the shorter ones leave the batch early."""
    requests = [Request(list(prompt), greedy(count)) for prompt, count in zip(prompts, max_tokens, strict=True)]
    for _ in engine.generate(requests):
        pass
    engine.check_integrity()
    return [request.output_ids for request in requests]


class Truth:
    """What the model itself writes with all experts resident, and its logits in every decode step."""

    def __init__(self, folder: Path, num_experts: int, prompts: Sequence[list[int]], max_tokens: Sequence[int]) -> None:
        self.logits: list[Tensor] = []

        def by_the_model(parts: StepParts) -> StepRunner:
            return lambda new_tokens: self._noted(parts.model(parts.cache.batch(new_tokens)))

        with assembled(folder, "resident", num_experts, ThreadedCopyEngine, make_step_runner=by_the_model) as engine:
            self.tokens = write(engine, prompts, max_tokens)

    def differences(self, logits: Sequence[Tensor], rounds: int = 1) -> list[int]:
        """The steps whose logits have other bits; all of them where there are more steps, or fewer."""
        true = self.logits * rounds
        if len(true) != len(logits):
            return list(range(len(logits)))
        pairs = enumerate(zip(true, logits, strict=True))
        return [step for step, (one, other) in pairs if not torch.equal(one.view(torch.int32), other.view(torch.int32))]

    def _noted(self, logits_BV: Tensor) -> Tensor:
        self.logits.append(logits_BV)
        return logits_BV
