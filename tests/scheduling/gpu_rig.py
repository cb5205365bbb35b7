"""A scheduler with a GPU's numbers: a host that runs ahead of a compute lane, a link, and the shapes of real models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.tickets import PIECE_BYTES
from duoserve.experts.virtual import ComputeLane, VirtualClock
from duoserve.metrics import Meter
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.scheduling.source import ReadyExpert
from tests.helpers.fakes import SMALL
from tests.scheduling.recording import Read, RecordingEngine
from tests.scheduling.rig import Routing


class Shape(NamedTuple):
    """The figures of a model that a timeline depends on; bytes are those of bf16."""

    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    attention_bytes: int  # of the weights between two MoE blocks, router included
    attention_width: int  # heads * head_dim

    def of_model(self) -> ModelShape:
        return ModelShape(self.experts, self.top_k, tuple(range(self.layers)))

    def all_experts(self) -> Routing:
        return [list(range(self.experts))] * self.layers


MIXTRAL = Shape(32, 8, 2, 3 * 4096 * 14336 * 2, 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096), 4096)
QWEN3 = Shape(48, 128, 8, 3 * 2048 * 768 * 2, 2 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048), 4096)


class Device(NamedTuple):
    """What a GPU reaches, in FLOP/s and bytes/s."""

    flops: float
    memory: float

    def seconds(self, weight_bytes: int, tokens: float, other_flops: float = 0.0) -> float:
        """Multiplying ``tokens`` rows by weights in bf16: two FLOPs for each weight, which has two bytes."""
        return max(weight_bytes / self.memory, (weight_bytes * tokens + other_flops) / self.flops)

    def attention(self, shape: Shape, tokens: int) -> float:
        """One layer up to the router's choice; causal attention is two products of half a square."""
        return self.seconds(shape.attention_bytes, tokens, 2.0 * tokens**2 * shape.attention_width)

    def expert(self, shape: Shape, tokens: int) -> float:
        """One expert, if ``tokens`` are spread evenly."""
        return self.seconds(shape.expert_bytes, max(1.0, tokens * shape.top_k / shape.experts))


class GpuRig:
    """A model of ``shape`` over ``slots`` slots and a link of ``link`` bytes/s, which heeds priorities unless shuffled.

    The pool is a stand-in, for no bytes move. ``reads`` is what the kernels read, and when.
    """

    def __init__(
        self,
        policy: str,
        shape: Shape,
        slots: int,
        link: float,
        piece_bytes: int | None = PIECE_BYTES,
        shuffle: int | None = None,
    ) -> None:
        self.shape = shape
        self.link = link
        self.clock = VirtualClock()
        self.lane = ComputeLane(self.clock)
        self.meter = Meter(lambda: self.clock.now)
        self.reads: list[Read] = []
        self.engine = RecordingEngine(
            self.clock,
            lambda nbytes: nbytes / link,
            shuffle=None if shuffle is None else random.Random(shuffle),
            nbytes=shape.expert_bytes,
            piece_bytes=piece_bytes,
            lane=self.lane,
            on_copied=self.meter.copied,
        )
        pool = SlotPool(slots, SMALL)
        self.scheduler = Scheduler(shape.of_model(), pool, self.engine, get_policy(policy), self.meter)
        self.table = self.scheduler.table

    @property
    def copy_s(self) -> float:
        """Seconds for an expert on the link."""
        return self.shape.expert_bytes / self.link

    def run(self, phase: Phase, routing: Routing, tokens: int, attention_s: float, expert_s: float) -> float:
        """One forward pass; returns the seconds until its result was on the host.

        ``attention_s`` is the time of a layer up to its router's choice, ``expert_s`` that of one expert.
        """
        begun = self.clock.now
        self.scheduler.begin(phase, tokens)
        for layer, wanted in enumerate(routing):
            self.lane.launch(attention_s)
            self.lane.synchronize()  # the router's choice
            with self.scheduler.acquire(layer, wanted) as lease:
                for ready in lease:
                    self._launch(layer, ready, expert_s)
        self.scheduler.end()
        self.lane.synchronize()
        return self.clock.now - begun

    def _launch(self, layer: int, ready: Sequence[ReadyExpert], expert_s: float) -> None:
        """The experts of a batch are one launch."""
        start, stop = self.lane.launch(expert_s * len(ready))
        self.reads += [Read(start, stop, slot, ExpertId(layer, expert)) for expert, slot in ready]
