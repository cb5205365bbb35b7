"""An engine put together by hand from a checkpoint, so that a test can choose its store and its copy engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from duoserve import SamplingParams
from duoserve.engine import Engine, Request
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.copy_engine import CopyEngine
from duoserve.experts.layout import ExpertLayout
from duoserve.experts.packing import CheckpointStore
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.kv_cache import PagedKVCache
from duoserve.loading import make_scheduler
from duoserve.metrics import Meter
from duoserve.models.listening import listened_to
from duoserve.models.registry import family_of
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.routing import RoutingListener


@contextmanager
def assembled(
    folder: Path,
    policy: str,
    slots: int,
    make_copies: Callable[[ExpertStore, SlotPool], CopyEngine],
    listener: RoutingListener | None = None,
) -> Iterator[Engine]:
    """An engine whose slots are poisoned and whose copies are made by ``make_copies(store, pool)``."""
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    layout = ExpertLayout(config.dtype, config.hidden_size, config.expert_intermediate_size)
    store = CheckpointStore(checkpoint, layout, family.expert_names)
    pool, meter = SlotPool(slots, layout, poison=True), Meter()
    scheduler = make_scheduler(config, pool, make_copies(store, pool), get_policy(policy), meter)
    try:
        built = family.build(config, checkpoint.read, scheduler, pool.weights)
        transformer, tap = (built, None) if listener is None else listened_to(built, listener)
        yield Engine(transformer, config, scheduler, PagedKVCache(config, 256, config.dtype), meter, tap=tap)
    finally:
        scheduler.close()
        checkpoint.close()


def tokens_of(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """The tokens of one request."""
    return [token for _, token in engine.generate([Request(prompt, params)])]
