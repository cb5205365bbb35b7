"""How a model will be run: the policy, its predictor, and the memory for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from duoserve.callers import warn_caller
from duoserve.config import EngineConfig
from duoserve.errors import ConfigError, TraceError
from duoserve.experts.budget import MemoryPlan
from duoserve.experts.checkpoint import Checkpoint
from duoserve.loading.placement import Placement
from duoserve.loading.recommendation import Recommendation, find_recommendation, predictor_beside, recommended_predictor
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.files import check_model, check_shape, load_predictor
from duoserve.scheduling.plan import GuessMode, ModelShape
from duoserve.scheduling.policies import Policy, get_policy
from duoserve.scheduling.predictor import Predictor


class Decision(NamedTuple):
    """Where and how a model will be run, and how memory is divided for that."""

    place: Placement
    wanted: EngineConfig
    policy: Policy
    predictor: Predictor | None
    plan: MemoryPlan


def named_policy(policy: str | Policy) -> Policy | None:
    """The policy that was asked for, None for "auto"."""
    if isinstance(policy, Policy):
        return policy
    return None if policy == "auto" else get_policy(policy)


def decide(
    place: Placement,
    wanted: EngineConfig,
    named: Policy | None,
    predictor: Predictor | str | Path | None,
    cache_dir: str | Path | None,
) -> Decision:
    """How the model will be run: under the policy that was ``named``, or else one that suits its memory.

    Warns and goes on where the saved recommendation cannot be read (it is ignored), its predictor cannot be read (no
    guesses are made), the predictor asked for is not found, or "auto" picks a policy that makes no guesses.
    Raises TraceError or ConfigError for a predictor that cannot be used, MemoryBudgetError if memory is too small.
    """
    checkpoint, shape = place.model.checkpoint, ModelShape.of(place.model.config)
    plan = place.plan(wanted, named)
    best, recommended = None, None
    if named is None and not plan.all_in_slots:
        best, recommended = _best(checkpoint, shape, cache_dir, with_predictor=predictor is None)
    policy = named or _automatic(plan, best, guesses=predictor is not None)
    used = recommended if predictor is None else _asked_for(predictor, checkpoint, shape, cache_dir)
    if predictor is not None and not policy.all_resident:
        _warn_if_unused(used, policy, automatic=named is None)
    return Decision(place, wanted, policy, used, plan)


def _best(
    checkpoint: Checkpoint, shape: ModelShape, cache_dir: str | Path | None, *, with_predictor: bool
) -> tuple[Recommendation | None, Predictor | None]:
    """The recommendation for this model and its predictor; warns of what is broken and goes on without it."""
    try:
        found = find_recommendation(checkpoint, cache_dir)
    except TraceError as error:
        warn_caller(f'policy="auto" ignores what duoserve evaluate recommends: {error}')
        return None, None
    best, folder = found or (None, None)
    if best is None or folder is None or not (best.use_predictor and with_predictor):
        return best, None
    try:
        return best, _checked(recommended_predictor(folder, checkpoint), shape)
    except TraceError as error:
        why = f"without the predictor that is recommended for this model: {error}; run duoserve evaluate again"
        warn_caller(f'policy="auto" makes no guesses {why}')
        return replace(best, use_predictor=False), None


def _automatic(plan: MemoryPlan, best: Recommendation | None, *, guesses: bool) -> Policy:
    """What "auto" means here: "resident" if every expert has a slot, else the policy of ``best``, else "duoserve".

    With ``guesses`` the policy keeps its guesses even if ``best`` found that they do not pay.
    """
    if plan.all_in_slots:
        return get_policy("resident")
    policy = get_policy("duoserve" if best is None else best.policy)
    return policy if guesses or best is None or best.use_predictor else policy.without_guesses()


def _warn_if_unused(predictor: Predictor | None, policy: Policy, *, automatic: bool) -> None:
    """Warns that the predictor the caller asked for was not found, or that an ``automatic`` policy ignores it."""
    if predictor is None:
        warn_caller('predictor="auto" found none beside the model: duoserve evaluate writes one')
    elif automatic and policy.guesses is GuessMode.NONE:
        why = f"policy={policy.name!r}, which duoserve evaluate recommends for this model, makes no guesses"
        warn_caller(f"the predictor is not used: {why}; name a policy that does")


def _asked_for(
    predictor: Predictor | str | Path, checkpoint: Checkpoint, shape: ModelShape, cache_dir: str | Path | None
) -> Predictor | None:
    """The predictor that the caller gave or named; None where "auto" finds none."""
    if predictor == "auto":
        beside = predictor_beside(checkpoint, cache_dir)
        return None if beside is None else _checked(beside, shape)
    if isinstance(predictor, (str, Path)):
        return _checked(load_predictor(Path(predictor), checkpoint.fingerprint()), shape)
    if not hasattr(predictor, "predict"):
        raise ConfigError(f"predictor is {predictor!r}, but must be a file, 'auto' or a Predictor")
    if isinstance(predictor, RowPredictor):
        check_model(predictor.meta, checkpoint.fingerprint(), f"predictor={predictor.name!r}")
        return _checked(predictor, shape)
    return predictor


def _checked(predictor: RowPredictor, shape: ModelShape) -> RowPredictor:
    """Returns ``predictor``; raises TraceError if it does not fit the model that its fingerprint says it is of."""
    check_shape(predictor.meta, shape, f"predictor={predictor.name!r}")
    return predictor
