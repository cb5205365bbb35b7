"""From a checkpoint to a running engine: check, plan the memory, place the weights, wire the floors together."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from duoserve.chat_template import ChatTemplate
from duoserve.choice import BestPolicy, find_choice, predictor_beside, predictor_in
from duoserve.compiled_prompts import compiled_prompts
from duoserve.config import EngineConfig, ModelConfig
from duoserve.decoding import DecoderParts, ModelDecoder, check_mode, make_decoder, possible_mode
from duoserve.engine import Engine
from duoserve.errors import ConfigError, TraceError
from duoserve.experts.budget import MemoryPlan
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.slots import SlotPool
from duoserve.kernels import Products
from duoserve.kernels.unpacking import with_compiled_unpacking
from duoserve.kv_cache import PagedKVCache
from duoserve.metrics import Meter
from duoserve.models.decoder import RoutedExperts
from duoserve.models.listening import listened_to
from duoserve.models.opened import opened
from duoserve.models.variants import with_products
from duoserve.passes import Passes
from duoserve.placement import Placement
from duoserve.predictors.files import load_predictor
from duoserve.scheduling.plan import GuessMode, ModelShape
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import RoutingListener, audience
from duoserve.scheduling.scheduler import Scheduler
from duoserve.text import Text


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
    choice that cannot be read is passed over with a warning, and there is one where the predictor that was asked for
    is not there, or "auto" comes to a policy that makes no guesses.
    """
    named = _named_policy(policy)
    with ExitStack() as held:
        found = held.enter_context(opened(model))
        text, template = Text.load(found.checkpoint.folder), ChatTemplate.load(found.checkpoint.folder)
        if template is not None:
            held.callback(template.close)
        place = Placement.of(found, wanted)
        check_mode(wanted.decode_mode, place.device)
        plan = place.plan(wanted, needs_all=named is not None and named.all_resident)
        best = None if named is not None else _best(found.checkpoint, cache_dir)
        chosen = named or _automatic(plan, best[0] if best else None, guesses=predictor is not None)
        found_predictor = _find_predictor(predictor, best, found.checkpoint, cache_dir)
        if predictor is not None and not chosen.all_resident:
            _warn_of_silence(found_predictor, chosen, automatic=named is None)
        mode = possible_mode(wanted.decode_mode)
        store = place.slow_tier(plan, cache_dir, held, wanted.quantize)
        meter, pool = Meter(), SlotPool(plan.num_slots, store.layout, device=place.device)
        copies = place.copy_engine(store, pool, wanted.copy_threads, meter)
        scheduler = Scheduler(ModelShape.of(found.config), pool, copies, chosen, meter, found_predictor)
        held.enter_context(closing(scheduler))
        if chosen.all_resident:
            scheduler.load_all(progress=sys.stderr.isatty())
        compiles = mode == "compiled"
        weights = with_compiled_unpacking(pool.weights) if compiles else pool.weights
        built = found.family.build(found.config, place.dense_reader(), RoutedExperts(scheduler, weights))
        heard_by = audience(scheduler.listener, listener)
        transformer, tap = (built, None) if heard_by is None else listened_to(built, heard_by)
        cache = PagedKVCache(found.config, place.max_context, place.dtype, place.device)
        parts = DecoderParts(transformer, cache, scheduler, store, pool)
        decoder = make_decoder(mode, chosen, parts)
        if wanted.invariant:
            decoder = ModelDecoder(with_products(transformer, Products.BY_ROW), cache)
            transformer = with_products(transformer, Products.BY_TILE)
        if compiles:
            transformer = compiled_prompts(transformer, cache)
        passes = Passes(transformer, scheduler, cache, meter, tap=tap, decoder=decoder)
        engine = Engine(passes, found.config, cache, meter)
        return Runtime(found.config, plan, chosen, text, template, engine, meter, held.pop_all())


def _best(checkpoint: Checkpoint, cache_dir: str | Path | None) -> tuple[BestPolicy, Path] | None:
    try:
        return find_choice(checkpoint, cache_dir)
    except TraceError as error:
        warnings.warn(f'policy="auto" goes without what was chosen for this model: {error}', stacklevel=3)
        return None


def _automatic(plan: MemoryPlan, best: BestPolicy | None, *, guesses: bool) -> Policy:
    """``guesses``: whether they are made where they were found not to pay."""
    if plan.num_slots == plan.total_experts:
        return get_policy("resident")
    policy = get_policy("duoserve" if best is None else best.policy)
    return policy if guesses or best is None or best.use_predictor else policy.without_guesses()


def _warn_of_silence(predictor: Predictor | None, policy: Policy, *, automatic: bool) -> None:
    """Where a predictor was asked for, and there is none, or a policy that nobody named does not hear it."""
    if predictor is None:
        warnings.warn('predictor="auto" found none beside the model: duoserve evaluate writes one', stacklevel=3)
    elif automatic and policy.guesses is GuessMode.NONE:
        why = f"policy={policy.name!r}, which duoserve evaluate chose for this model, makes no guesses"
        warnings.warn(f"the predictor is not used: {why}; name a policy that does", stacklevel=3)


def _find_predictor(
    predictor: Predictor | str | Path | None,
    best: tuple[BestPolicy, Path] | None,
    checkpoint: Checkpoint,
    cache_dir: str | Path | None,
) -> Predictor | None:
    """The predictor that was asked for, or chosen with the policy."""
    if predictor is None and best is not None and best[0].use_predictor:
        return predictor_in(best[1], checkpoint)
    if predictor == "auto":
        return predictor_beside(checkpoint, cache_dir)
    if isinstance(predictor, (str, Path)):
        return load_predictor(Path(predictor), checkpoint.fingerprint())
    if predictor is not None and not hasattr(predictor, "predict"):
        raise ConfigError(f"predictor is {predictor!r}, but must be a file, 'auto' or a Predictor")
    return predictor


def _named_policy(policy: str | Policy) -> Policy | None:
    """The policy that was asked for, None for "auto"."""
    if isinstance(policy, Policy):
        return policy
    return None if policy == "auto" else get_policy(policy)
