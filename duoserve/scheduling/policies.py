"""The named bundles of pure parts: how prefill streams, how decode brings what it misses, what eviction picks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from duoserve.config import Phase
from duoserve.errors import ConfigError
from duoserve.scheduling.eviction import Eviction
from duoserve.scheduling.plan import DecodeMode, GuessMode, PrefillMode
from duoserve.scheduling.ranking import Activation, DecayedFrequency, Frequency, LeastStale, Recency

EVICTIONS = {
    "lru": Eviction(Recency, per_layer=True),
    "lfu": Eviction(Frequency, per_layer=True),
    "lfru": Eviction(DecayedFrequency, per_layer=True),
    "least-stale": Eviction(LeastStale, per_layer=True),
    "activation": Eviction(Activation, per_layer=False),
}
NEVER_BELOW_LRU = Eviction(DecayedFrequency, per_layer=True, rival=Recency)


@dataclass(frozen=True)
class Policy:
    """How experts are moved. ``keeps``: an expert stays in its slot after its layer, until it is evicted.

    ``predictor`` is the kind whose word ``guesses`` are made of in decode; a policy without one makes none.
    """

    name: str
    prefill: PrefillMode
    decode: DecodeMode
    eviction: Eviction = EVICTIONS["lru"]
    keeps: bool = True
    predictor: str | None = None
    guesses: GuessMode = GuessMode.NONE

    @property
    def all_resident(self) -> bool:
        """Whether every expert must be in a slot before the first pass."""
        return self.decode is DecodeMode.RESIDENT

    def without_guesses(self) -> Policy:
        """The same without prefetches in decode."""
        return replace(self, predictor=None, guesses=GuessMode.NONE)

    def looks_ahead(self, phase: Phase) -> bool:
        """Whether plans of this phase need to know which experts of other layers are present."""
        if phase is Phase.PREFILL:
            return self.prefill is PrefillMode.NEXT_LAYER or self.prefill.has_ring
        return self.decode is DecodeMode.NEXT_LAYER


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("resident", PrefillMode.RESIDENT, DecodeMode.RESIDENT),
        Policy("on-demand", PrefillMode.ON_DEMAND, DecodeMode.ON_DEMAND, keeps=False),
        Policy("layer-prefetch", PrefillMode.NEXT_LAYER, DecodeMode.NEXT_LAYER, keeps=False),
        Policy("lru", PrefillMode.OVERLAP, DecodeMode.CACHE),
        Policy(
            "activation-matrix",
            PrefillMode.OVERLAP,
            DecodeMode.CACHE,
            EVICTIONS["activation"],
            predictor="activation-matrix",
            guesses=GuessMode.TOP_K,
        ),
        Policy(
            "lookahead",
            PrefillMode.OVERLAP,
            DecodeMode.CACHE,
            EVICTIONS["lfru"],
            predictor="lookahead",
            guesses=GuessMode.TOP_K,
        ),
        Policy(
            "duoserve-paper",
            PrefillMode.TWO_BUFFERS,
            DecodeMode.CACHE,
            keeps=False,
            predictor="paper",
            guesses=GuessMode.TOP_K,
        ),
        Policy(
            "duoserve",
            PrefillMode.OVERLAP,
            DecodeMode.CACHE,
            NEVER_BELOW_LRU,
            predictor="duoserve",
            guesses=GuessMode.BUDGET,
        ),
    )
}


def get_policy(name: str) -> Policy:
    """The policy of that name; ConfigError with the names there are for any other."""
    if name not in POLICIES:
        raise ConfigError(f"policy={name!r} is not known: use one of {', '.join(map(repr, POLICIES))}")
    return POLICIES[name]
