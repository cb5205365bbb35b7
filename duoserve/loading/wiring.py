"""Puts the slots of a model and their scheduler together."""

from __future__ import annotations

from contextlib import ExitStack, closing

from duoserve.config import ModelConfig
from duoserve.experts.copy_engine import CopyEngine
from duoserve.experts.slots import SlotPool
from duoserve.metrics import Meter
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.scheduler import Scheduler


def make_scheduler(  # noqa: PLR0913, PLR0917
    config: ModelConfig,
    pool: SlotPool,
    copies: CopyEngine,
    policy: Policy,
    meter: Meter,
    resources: ExitStack,
    *,
    predictor: Predictor | None = None,
    progress: bool = False,
) -> Scheduler:
    """A scheduler of the slots in ``pool``, which have all experts if ``policy`` wants them resident.

    ``resources`` closes it and ``copies``, also if this fails. Errors are those of Scheduler and of its ``load_all``.
    """
    resources.enter_context(closing(copies))
    scheduler = Scheduler(ModelShape.of(config), pool, copies, policy, meter, predictor)
    resources.enter_context(closing(scheduler))
    if policy.all_resident:
        scheduler.load_all(progress=progress)
    return scheduler
