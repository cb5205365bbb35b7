"""From a checkpoint to a running engine: check, plan the memory, place the weights, wire the floors together."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from duoserve.choice import BestPolicy, chosen_predictor, find_choice, predictor_beside
from duoserve.config import EngineConfig, ModelConfig
from duoserve.engine import Engine
from duoserve.errors import ConfigError, TraceError
from duoserve.experts.budget import MemoryPlan
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.kernels import Products
from duoserve.kernels.compiled.unpacking import with_compiled_unpacking
from duoserve.kv_cache import PagedKVCache
from duoserve.launching.compiled_prompts import compiled_prompts
from duoserve.launching.launch import DecoderParts, VariantDecoder, make_decoder, resolve_mode
from duoserve.metrics import Meter
from duoserve.models.decoder import RoutedExperts
from duoserve.models.listening import listened_to
from duoserve.models.opened import opened
from duoserve.models.tap import RoutingTap
from duoserve.models.transformer import Transformer
from duoserve.models.variants import with_products
from duoserve.out_of_memory import explained_refusals
from duoserve.passes import Decoder, Passes
from duoserve.placement import Placement
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.files import check_model, load_predictor
from duoserve.scheduling.plan import GuessMode, ModelShape
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import RoutingListener, audience
from duoserve.scheduling.scheduler import Scheduler
from duoserve.text.chat_template import ChatTemplate
from duoserve.text.tokenizer import Text

CALLER = 5  # of from_pretrained: so many calls up from the functions of this file that warn


@dataclass(frozen=True)
class Runtime:
    """A loaded model and all that it holds open."""

    config: ModelConfig
    plan: MemoryPlan
    policy: Policy
    text: Text | None
    chat_template: ChatTemplate | None
    engine: Engine
    meter: Meter
    _held: ExitStack

    def close(self) -> None:
        """Stops the copies, then closes the files, in the reverse order of opening."""
        self._held.close()


class Decision(NamedTuple):
    """Where and how a model will be run, and how memory is divided for that."""

    place: Placement
    wanted: EngineConfig
    policy: Policy
    predictor: Predictor | None
    plan: MemoryPlan


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
    is what ``duoserve evaluate`` has chosen, its predictor included, else "duoserve"; "resident" where all fit. A
    choice that cannot be read is passed over with a warning, or makes no guesses where only its predictor cannot be;
    and there is one where the predictor that was asked for is not there, or "auto" comes to a policy without guesses.
    MemoryBudgetError for memory that the plan cannot have, or that is refused when it is carried out.
    """
    named = _named_policy(policy)
    with ExitStack() as held:
        found = held.enter_context(opened(model))
        text, template = Text.load(found.checkpoint.folder), ChatTemplate.load(found.checkpoint.folder)
        if template is not None:
            held.callback(template.close)
        place = Placement.of(found, wanted)
        # Before the plan: compiled steps take memory, and so does the compiler that is tried.
        wanted = replace(wanted, decode_mode=resolve_mode(wanted.decode_mode, place.device))
        decision = _decide(place, wanted, named, predictor, cache_dir)
        meter = Meter()
        with explained_refusals("the model was loaded"):
            store = place.slow_tier(decision.plan, cache_dir, held, wanted.quantize, decision.policy.keeps)
            engine = _engine(decision, store, meter, listener, held)
        return Runtime(
            config=found.config,
            plan=decision.plan,
            policy=decision.policy,
            text=text,
            chat_template=template,
            engine=engine,
            meter=meter,
            _held=held.pop_all(),
        )


def _decide(
    place: Placement,
    wanted: EngineConfig,
    named: Policy | None,
    predictor: Predictor | str | Path | None,
    cache_dir: str | Path | None,
) -> Decision:
    """How the model will be run: under the policy that was ``named``, or else what suits its memory."""
    checkpoint = place.found.checkpoint
    needs_all, keeps = (named.all_resident, named.keeps) if named is not None else (False, True)
    plan = place.plan(wanted, needs_all, keeps)
    best, chosen = None, None
    if named is None and plan.num_slots < plan.total_experts:
        best, chosen = _best(checkpoint, cache_dir, with_predictor=predictor is None)
    policy = named or _automatic(plan, best, guesses=predictor is not None)
    found = chosen if predictor is None else _asked_for(predictor, checkpoint, cache_dir)
    if predictor is not None and not policy.all_resident:
        _warn_if_unused(found, policy, automatic=named is None)
    return Decision(place, wanted, policy, found, plan)


def _engine(
    decision: Decision, store: ExpertStore, meter: Meter, listener: RoutingListener | None, held: ExitStack
) -> Engine:
    """The floors wired together, from the slots up to the passes; ``held`` closes what is open of them."""
    place, policy, config = decision.place, decision.policy, decision.place.found.config
    pool = SlotPool(decision.plan.num_slots, store.layout, device=place.device)
    copies = held.enter_context(closing(place.copy_engine(store, pool, decision.wanted.copy_threads, meter)))
    scheduler = Scheduler(ModelShape.of(config), pool, copies, policy, meter, decision.predictor)
    held.enter_context(closing(scheduler))
    if policy.all_resident:
        scheduler.load_all(progress=sys.stderr.isatty())
    transformer, tap = _build(decision, scheduler, pool, listener)
    cache = PagedKVCache(config, place.max_context, place.dtype, place.device)
    prompts, decoder = _ways(DecoderParts(transformer, cache, scheduler, store, pool), decision)
    return Engine(Passes(prompts, scheduler, cache, meter, tap=tap, decoder=decoder), config, cache, meter)


def _build(
    decision: Decision, scheduler: Scheduler, pool: SlotPool, listener: RoutingListener | None
) -> tuple[Transformer, RoutingTap | None]:
    """The model over the experts in the slots, and the tap of its routers if anybody listens."""
    place, found = decision.place, decision.place.found
    compiles = decision.wanted.decode_mode == "compiled"
    weights = with_compiled_unpacking(pool.weights) if compiles else pool.weights
    built = found.family.build(found.config, place.dense_reader(), RoutedExperts(scheduler, weights))
    heard_by = audience(scheduler.listener, listener)
    return (built, None) if heard_by is None else listened_to(built, heard_by)


def _ways(parts: DecoderParts, decision: Decision) -> tuple[Transformer, Decoder | None]:
    """The model that computes prompts, and the decoder for decode steps; without one, that model computes them too."""
    model, cache, wanted = parts.model, parts.cache, decision.wanted
    if wanted.invariant:
        return with_products(model, Products.BY_TILE), VariantDecoder(with_products(model, Products.BY_ROW), cache)
    decoder = make_decoder(wanted.decode_mode, decision.policy, parts)
    return compiled_prompts(model, cache) if wanted.decode_mode == "compiled" else model, decoder


def _best(
    checkpoint: Checkpoint, cache_dir: str | Path | None, *, with_predictor: bool
) -> tuple[BestPolicy | None, Predictor | None]:
    """What ``duoserve evaluate`` chose for this model, and its predictor; what is broken of them is only warned of."""
    try:
        found = find_choice(checkpoint, cache_dir)
    except TraceError as error:
        warnings.warn(f'policy="auto" goes without what was chosen for this model: {error}', stacklevel=CALLER)
        return None, None
    best, folder = found or (None, None)
    if best is None or folder is None or not (best.use_predictor and with_predictor):
        return best, None
    try:
        return best, chosen_predictor(folder, checkpoint)
    except TraceError as error:
        why = f"without the predictor that was chosen for this model: {error}; run duoserve evaluate again"
        warnings.warn(f'policy="auto" makes no guesses {why}', stacklevel=CALLER)
        return replace(best, use_predictor=False), None


def _automatic(plan: MemoryPlan, best: BestPolicy | None, *, guesses: bool) -> Policy:
    """What "auto" comes to: "resident" where every expert has a slot, else the policy of ``best``, else "duoserve".

    With ``guesses`` the policy keeps its guesses even if ``best`` found that they do not pay.
    """
    if plan.num_slots == plan.total_experts:
        return get_policy("resident")
    policy = get_policy("duoserve" if best is None else best.policy)
    return policy if guesses or best is None or best.use_predictor else policy.without_guesses()


def _warn_if_unused(predictor: Predictor | None, policy: Policy, *, automatic: bool) -> None:
    """Warns that the predictor the caller asked for was not found, or that an ``automatic`` policy ignores it."""
    if predictor is None:
        warnings.warn('predictor="auto" found none beside the model: duoserve evaluate writes one', stacklevel=CALLER)
    elif automatic and policy.guesses is GuessMode.NONE:
        why = f"policy={policy.name!r}, which duoserve evaluate chose for this model, makes no guesses"
        warnings.warn(f"the predictor is not used: {why}; name a policy that does", stacklevel=CALLER)


def _asked_for(
    predictor: Predictor | str | Path, checkpoint: Checkpoint, cache_dir: str | Path | None
) -> Predictor | None:
    """The predictor that the caller gave or named; None where "auto" finds none."""
    if predictor == "auto":
        return predictor_beside(checkpoint, cache_dir)
    if isinstance(predictor, (str, Path)):
        return load_predictor(Path(predictor), checkpoint.fingerprint())
    if not hasattr(predictor, "predict"):
        raise ConfigError(f"predictor is {predictor!r}, but must be a file, 'auto' or a Predictor")
    if isinstance(predictor, RowPredictor):
        check_model(predictor.meta, checkpoint.fingerprint(), f"predictor={predictor.name!r}")
    return predictor


def _named_policy(policy: str | Policy) -> Policy | None:
    """The policy that was asked for, None for "auto"."""
    if isinstance(policy, Policy):
        return policy
    return None if policy == "auto" else get_policy(policy)
