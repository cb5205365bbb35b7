"""A few layers with a model's own sizes and made-up weights: what can be run before the model is downloaded.

All that they are made of is what a loaded model is made of. S slots, T tokens, K top-k, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from math import floor, log2
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.architecture import AttentionConfig
from duoserve.config import EngineConfig, ModelConfig
from duoserve.engine import Engine
from duoserve.experts.copy_engine import ThreadedCopyEngine
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.packing import write_pack
from duoserve.experts.rows import DenseMemory, aligned_rows
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore, HostStore
from duoserve.kernels import ExpertFormat
from duoserve.kernels.bf12 import LEAST, Bf12Rows
from duoserve.kernels.weights import Matrix
from duoserve.kv_cache import PagedKVCache
from duoserve.loading.wiring import make_scheduler
from duoserve.metrics import Meter
from duoserve.models.decoder import RoutedExperts
from duoserve.models.family import Family
from duoserve.models.listening import listened_to
from duoserve.models.moe import RoutingScript
from duoserve.models.tensors import ReadTensor
from duoserve.models.variants import with_script
from duoserve.passes import Passes
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.scheduling.source import ExpertSource, Lease

LEAST_WEIGHT = 2.0**-13  # float16 has smaller ones, but computes with them slowly
BF12_SCALE = 2.0**-14
MXFP4_SCALE_OF_1 = 127
# The bytes whose codes all stand for 1, the scale left out.
ONES = {ExpertFormat.INT4: 0x11, ExpertFormat.INT8: 0x01, ExpertFormat.FP8: 0x38, ExpertFormat.MXFP4: 0x22}
FINGERPRINT = "made up"


def few_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The same model with ``count`` layers, all of which have experts."""
    layers = config.moe_layers[:count]
    blocks = replace(config.blocks, moe=replace(config.blocks.moe, layers=tuple(range(len(layers)))))
    attention = blocks.attention
    if isinstance(attention, AttentionConfig):
        windows = tuple(attention.windows[layer] for layer in layers)
        blocks = replace(blocks, attention=replace(attention, windows=windows))
    return replace(config, num_layers=len(layers), blocks=blocks)


class MadeUpStore(ExpertStore):
    """A store in which all experts have the same row."""

    def __init__(self, layout: ExpertLayout) -> None:
        self.layout = layout
        self._row_B = aligned_rows(1, layout.slot_bytes)[0]
        weights = layout.weights(self._row_B.view(1, -1))
        for matrix in (weights.w13, weights.w2):
            weight = _weight(matrix.inner)
            if matrix.format is ExpertFormat.FLOAT:
                matrix.data_SNB.fill_(weight)
                continue
            if matrix.format is ExpertFormat.BF12:
                _fill_bf12(matrix)
                continue
            matrix.data_SNB.view(torch.uint8).fill_(ONES[matrix.format])
            if matrix.scales_SGN is not None:
                of_mxfp4 = MXFP4_SCALE_OF_1 + floor(log2(weight))
                matrix.scales_SGN.fill_(of_mxfp4 if matrix.format is ExpertFormat.MXFP4 else weight)
            if matrix.order_SD is not None:
                matrix.order_SD.copy_(torch.arange(matrix.order_SD.shape[1]))

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        row_B.copy_(self._row_B)

    def close(self) -> None:
        """Nothing is held."""


def _weight(num_inputs: int) -> float:
    """The value of every weight of a matrix with ``num_inputs`` inputs. None is so small that float16 is slow with it.

    A product is about as large as its inputs, so that float16 holds what many layers add.
    """
    return max(1 / num_inputs, LEAST_WEIGHT)


def _fill_bf12(matrix: Matrix) -> None:
    """All weights alike, and none an escape."""
    assert matrix.scales_SGN is not None
    matrix.data_SNB.zero_()
    matrix.scales_SGN.fill_(BF12_SCALE)
    Bf12Rows.of(matrix.data_SNB[0], matrix.scales_SGN[0, 0], matrix.inner).escapes_NC.fill_(LEAST * BF12_SCALE)


@dataclass
class PassNotes:
    """One forward pass: when each layer asked for its experts, in seconds, and how many of them were missing.

    ``away_s`` is what the watching took; it is left out of ``asked_s``.
    """

    asked_s: list[float] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    away_s: float = 0.0


class Watch(ExpertSource, RoutingScript):
    """Chooses in the routers' place and notes what comes of it; its own time is left out.

    In a decode step, each number of missing experts is equally likely at each layer. A prompt's tokens choose by
    chance.
    """

    def __init__(self, scheduler: Scheduler, config: ModelConfig) -> None:
        self._scheduler = scheduler
        self._config = config
        self._random = random.Random(0)
        self._generator = torch.Generator().manual_seed(0)
        self._away_s = 0.0
        self.passes: list[PassNotes] = []

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> Lease:
        with self._off_the_clock() as now:
            run = self.passes[-1]
            run.asked_s.append(now)
            run.missing.append(sum(not self._scheduler.table.is_ready(ExpertId(layer, expert)) for expert in experts))
        return self._scheduler.acquire(layer, experts, counts)

    def chosen(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        with self._off_the_clock():
            if layer == 0:
                self.passes.append(PassNotes())
            ids_TK = self._of_prompt(num_tokens) if num_tokens > 1 else torch.tensor([self._of_step(layer)])
            return torch.full(ids_TK.shape, 1 / self._config.top_k), ids_TK

    def _of_prompt(self, num_tokens: int) -> Tensor:
        scores_TE = torch.rand(num_tokens, self._config.num_experts, generator=self._generator)
        return scores_TE.topk(self._config.top_k).indices

    def _of_step(self, layer: int) -> list[int]:
        """A step's experts. As many of them are missing as the dice say, as far as the layer's slots allow that."""
        top_k, dice = self._config.top_k, self._random
        experts = dice.sample(range(self._config.num_experts), self._config.num_experts)
        ready = [expert for expert in experts if self._scheduler.table.is_ready(ExpertId(layer, expert))]
        absent = [expert for expert in experts if expert not in ready]
        num_missing = min(len(absent), max(dice.randint(0, top_k), top_k - len(ready)))
        return absent[:num_missing] + ready[: top_k - num_missing]

    @contextmanager
    def _off_the_clock(self) -> Iterator[float]:
        begun = time.perf_counter()
        yield begun - self._away_s
        taken = time.perf_counter() - begun
        self._away_s += taken
        if self.passes:
            self.passes[-1].away_s += taken


@dataclass(frozen=True)
class Stage:
    """What is put up once for all policies: the dense weights, and the experts on the disk and in RAM."""

    family: Family
    config: ModelConfig
    layout: ExpertLayout
    read: ReadTensor
    stores: dict[str, ExpertStore]


@contextmanager
def staged(family: Family, config: ModelConfig, layout: ExpertLayout, folder: Path) -> Iterator[Stage]:
    """Puts up a model of ``config``; ``folder`` is where the packed experts are while it stands."""
    experts = list(ModelShape.of(config).all_experts())
    source = MadeUpStore(layout)
    write_pack(source, experts, folder, FINGERPRINT)
    needs, memory = family.dense_needs(config), DenseMemory(family.dense_sizes(config, config.dtype))
    tensors = {name: memory.keep(_dense(name, need.shape, need.dtype or config.dtype)) for name, need in needs.items()}
    with ExitStack() as resources:
        disk = DiskStore(folder, layout, config.num_layers, config.num_experts, FINGERPRINT)
        stores = {
            "disk": resources.enter_context(closing(disk)),
            "ram": resources.enter_context(closing(HostStore(source, experts))),
        }
        yield Stage(family, config, layout, lambda name, dtype=None: tensors[name], stores)


def _dense(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The dense tensor ``name``, all of one value: 1 in norms, which then scale nothing, else as ``_weight`` has it."""
    return torch.full(shape, 1.0 if "norm" in name and len(shape) == 1 else _weight(shape[-1]), dtype=dtype)


class Running(NamedTuple):
    """A staged model at work: its engine takes requests; the meter and the watch measure them."""

    engine: Engine
    meter: Meter
    watch: Watch
    slot_bytes: int


@contextmanager
def running(stage: Stage, policy: Policy, num_slots: int, tier: str, context: int) -> Iterator[Running]:
    """The staged model under ``policy``, its experts in the store named ``tier``, room for ``context`` tokens."""
    config, meter, pool = stage.config, Meter(), SlotPool(num_slots, stage.layout)
    copies = ThreadedCopyEngine(stage.stores[tier], pool, EngineConfig().copy_threads, on_copied=meter.copied)
    with ExitStack() as resources:
        scheduler = make_scheduler(config, pool, copies, policy, meter, resources)
        watch = Watch(scheduler, config)
        built = stage.family.build(config, stage.read, RoutedExperts(watch, pool.weights))
        model, tap = listened_to(with_script(built, watch), scheduler.listener)
        cache = PagedKVCache(config, context, config.dtype, torch.device("cpu"))
        passes = Passes(model, scheduler, cache, meter, tap=tap)
        yield Running(Engine(passes, config, cache, meter), meter, watch, stage.layout.slot_bytes)
