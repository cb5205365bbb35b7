"""An engine put together by hand from a checkpoint, so that a test can choose its store and its copy engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from duoserve import SamplingParams
from duoserve.config import ModelConfig
from duoserve.engine import Engine
from duoserve.experts.copy_engine import CopyEngine
from duoserve.experts.device import CPU
from duoserve.experts.layout import ExpertLayout
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.kv_cache import PagedKVCache
from duoserve.launching.launch import StepParts
from duoserve.loading.wiring import make_scheduler
from duoserve.metrics import Meter
from duoserve.models.decoder import RoutedExperts
from duoserve.models.listening import listened_to
from duoserve.models.opened import opened
from duoserve.models.transformer import Transformer
from duoserve.passes import Passes, StepRunner
from duoserve.request import Request
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import RoutingListener, audience


class AssembledEngine(Engine):
    """An engine that shows what it is made of."""

    def __init__(self, passes: Passes, parts: StepParts, config: ModelConfig, copies: CopyEngine, meter: Meter) -> None:
        super().__init__(passes, config, parts.cache, meter)
        self.passes, self.copies, self.meter = passes, copies, meter
        self.cache, self.scheduler = parts.cache, parts.scheduler


def poisoned(num_slots: int, layout: ExpertLayout) -> SlotPool:
    """Slots that read as NaN until they are written."""
    return SlotPool(num_slots, layout, poison=True)


@contextmanager
def assembled(
    folder: Path,
    policy: str,
    slots: int,
    make_copies: Callable[[ExpertStore, SlotPool], CopyEngine],
    listener: RoutingListener | None = None,
    predictor: Predictor | None = None,
    *,
    make_pool: Callable[[int, ExpertLayout], SlotPool] = poisoned,
    make_step_runner: Callable[[StepParts], StepRunner] | None = None,
    change: Callable[[Transformer], Transformer] = lambda model: model,
    device: torch.device = CPU,
    max_context: int = 256,
) -> Iterator[AssembledEngine]:
    """An engine whose slots are poisoned and whose copies are made by ``make_copies(store, pool)``.

    ``change`` makes another model of the one that was built.
    """
    with opened(folder) as found, ExitStack() as resources:
        config = found.config
        store = found.expert_store(config.dtype)
        pool, meter = make_pool(slots, store.layout), Meter()
        copies = make_copies(store, pool)
        scheduler = make_scheduler(config, pool, copies, get_policy(policy), meter, resources, predictor=predictor)
        built = found.family.build(
            config,
            lambda name, dtype=None: found.read(name, dtype or config.dtype).to(device),
            RoutedExperts(scheduler, pool.weights),
        )
        transformer, tap = listened_to(change(built), audience(scheduler.listener, listener))
        cache = PagedKVCache(config, max_context, config.dtype, device)
        parts = StepParts(transformer, cache, scheduler, store, pool)
        runner = None if make_step_runner is None else make_step_runner(parts)
        passes = Passes(transformer, scheduler, cache, meter, tap=tap, runner=runner)
        yield AssembledEngine(passes, parts, config, copies, meter)


def tokens_of(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """The tokens of one request."""
    return [token for _, token in engine.generate([Request(prompt, params)])]
