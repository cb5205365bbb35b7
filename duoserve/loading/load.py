"""From a checkpoint to a running engine: check, plan the memory, place the weights, wire the floors together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from duoserve.config import EngineConfig, ModelConfig
from duoserve.engine import Engine
from duoserve.experts.budget import MemoryPlan
from duoserve.experts.host_cores import warn_of_excess_threads
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.freed_memory import keep_freed_memory
from duoserve.kernels import Products
from duoserve.kernels.compiled.unpacking import with_compiled_unpacking
from duoserve.kv_cache import PagedKVCache
from duoserve.launching.compiled_prompts import compiled_prompts
from duoserve.launching.launch import StepParts, VariantRunner, check_graph, make_step_runner, resolve_mode
from duoserve.loading.deciding import Decision, decide, named_policy
from duoserve.loading.placement import Placement
from duoserve.loading.wiring import make_scheduler
from duoserve.metrics import Meter
from duoserve.models.decoder import RoutedExperts
from duoserve.models.listening import listened_to
from duoserve.models.opened import opened
from duoserve.models.tap import RoutingTap
from duoserve.models.transformer import Transformer
from duoserve.models.variants import with_products
from duoserve.openmp import ending_team
from duoserve.out_of_memory import explained_refusals
from duoserve.passes import Passes, StepRunner
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import RoutingListener, audience
from duoserve.scheduling.scheduler import Scheduler
from duoserve.text.chat_template import ChatTemplate
from duoserve.text.tokenizer import Tokenizer
from duoserve.torch_modes import as_in_new_thread


@dataclass(frozen=True)
class Runtime:
    """A loaded model and all that it holds open."""

    config: ModelConfig
    plan: MemoryPlan
    policy: Policy
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    engine: Engine
    meter: Meter
    _resources: ExitStack
    _ends: list[Callable[[], None]] = field(default_factory=list)

    def before_close(self, end: Callable[[], None]) -> None:
        """Has ``close`` call ``end`` first, which stops a service that runs the engine on a thread of its own."""
        self._ends.append(end)

    def close(self) -> None:
        """Stops the copies, then closes the files, in the reverse order of opening.

        What an ``end`` raises, KeyboardInterrupt for one, leaves all of them open: a step may still be under way.
        """
        for end in self._ends:
            end()
        self._resources.close()


def load(  # noqa: PLR0913
    model: str | Path,
    wanted: EngineConfig,
    policy: str | Policy,
    cache_dir: str | Path | None,
    listener: RoutingListener | None = None,
    *,
    predictor: Predictor | str | Path | None = None,
) -> Runtime:
    """Opens a checkpoint and makes it ready to run; whatever was opened is closed again when that fails.

    ``listener`` hears what the routers choose, and ``predictor`` says what they will, if the policy makes guesses;
    neither changes a result. A predictor is an object, its file, or "auto": the one beside the model. The policy "auto"
    is what ``duoserve evaluate`` has chosen, its predictor included, else "duoserve"; "resident" where all fit.
    MemoryBudgetError for memory that the plan cannot have, or that is refused when it is carried out.
    """
    named = named_policy(policy)
    with as_in_new_thread(), ending_team(), ExitStack() as resources:
        found = resources.enter_context(opened(model))
        tokenizer, template = Tokenizer.load(found.checkpoint.folder), ChatTemplate.load(found.checkpoint.folder)
        if template is not None:
            resources.callback(template.close)
        place = Placement.of(found, wanted)
        if place.device.type == "cpu":
            warn_of_excess_threads()
            keep_freed_memory()
        # Before the plan: compiled steps take memory, and so does the compiler that is tried.
        wanted = replace(wanted, decode_mode=resolve_mode(wanted.decode_mode, place.device))
        decision = decide(place, wanted, named, predictor, cache_dir)
        if wanted.decode_mode == "graph":
            check_graph(decision.policy, decision.plan.all_in_ram)
        meter = Meter()
        with explained_refusals("the model was loaded"):
            store = place.slow_tier(decision.plan, cache_dir, resources, wanted.quantize)
            engine = _engine(decision, store, meter, listener, resources)
        return Runtime(
            config=found.config,
            plan=decision.plan,
            policy=decision.policy,
            tokenizer=tokenizer,
            chat_template=template,
            engine=engine,
            meter=meter,
            _resources=resources.pop_all(),
        )


def _engine(
    decision: Decision, store: ExpertStore, meter: Meter, listener: RoutingListener | None, resources: ExitStack
) -> Engine:
    """The floors wired together, from the slots up to the passes; ``resources`` closes what is open of them."""
    place, config = decision.place, decision.place.model.config
    pool = SlotPool(decision.plan.num_slots, store.layout, device=place.device)
    copies = place.copy_engine(store, pool, decision.wanted.copy_threads, meter)
    predictor, progress = decision.predictor, sys.stderr.isatty()
    scheduler = make_scheduler(
        config, pool, copies, decision.policy, meter, resources, predictor=predictor, progress=progress
    )
    transformer, tap = _transformer_and_tap(decision, scheduler, pool, listener)
    cache = PagedKVCache(config, place.max_context, place.dtype, place.device)
    prompts, runner = _prompts_and_runner(StepParts(transformer, cache, scheduler, store, pool), decision)
    return Engine(Passes(prompts, scheduler, cache, meter, tap=tap, runner=runner), config, cache, meter)


def _transformer_and_tap(
    decision: Decision, scheduler: Scheduler, pool: SlotPool, listener: RoutingListener | None
) -> tuple[Transformer, RoutingTap | None]:
    """The model over the experts in the slots, and the tap of its routers if anybody listens."""
    place, model = decision.place, decision.place.model
    compiles = decision.wanted.decode_mode == "compiled"
    weights = with_compiled_unpacking(pool.weights) if compiles else pool.weights
    built = model.family.build(model.config, place.dense_reader(), RoutedExperts(scheduler, weights))
    return listened_to(built, audience(scheduler.listener, listener))


def _prompts_and_runner(parts: StepParts, decision: Decision) -> tuple[Transformer, StepRunner | None]:
    """The model that computes prompts, and the runner for decode steps; without one, that model computes them too."""
    model, cache, wanted = parts.model, parts.cache, decision.wanted
    if wanted.invariant:
        return with_products(model, Products.BY_TILE), VariantRunner(with_products(model, Products.BY_ROW), cache)
    runner = make_step_runner(wanted.decode_mode, decision.policy, parts)
    return compiled_prompts(model, cache) if wanted.decode_mode == "compiled" else model, runner
