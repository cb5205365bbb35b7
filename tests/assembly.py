"""An engine put together by hand from a checkpoint, so that a test can choose its store and its copy engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from duoserve import SamplingParams
from duoserve.engine import Engine, Request
from duoserve.experts.copy_engine import CopyEngine
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.kv_cache import PagedKVCache
from duoserve.loading import make_scheduler
from duoserve.metrics import Meter
from duoserve.models.decoder import RoutedExperts
from duoserve.models.listening import listened_to
from duoserve.models.opened import opened
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
    with opened(folder) as found:
        config = found.config
        store = found.expert_store(config.dtype)
        pool, meter = SlotPool(slots, store.layout, poison=True), Meter()
        scheduler = make_scheduler(config, pool, make_copies(store, pool), get_policy(policy), meter)
        with closing(scheduler):
            built = found.family.build(config, found.checkpoint.read, RoutedExperts(scheduler, pool.weights))
            transformer, tap = (built, None) if listener is None else listened_to(built, listener)
            yield Engine(transformer, config, scheduler, PagedKVCache(config, 256, config.dtype), meter, tap=tap)


def tokens_of(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """The tokens of one request."""
    return [token for _, token in engine.generate([Request(prompt, params)])]
