"""The named bundles of pure parts: how prefill streams, how decode brings what it misses, what eviction picks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from duoserve.config import Phase
from duoserve.errors import ConfigError
from duoserve.scheduling.eviction import Eviction
from duoserve.scheduling.plan import DecodeFetch, GuessMode, PrefillFetch
from duoserve.scheduling.ranking import Activation, DecayedFrequency, Frequency, LeastStale, Recency

# By what the experts in slots are ranked: see ranking.py.
EVICTIONS = {
    "lru": Eviction(Recency, per_layer=True),  # the last use
    "lfu": Eviction(Frequency, per_layer=True),  # the number of uses
    "lfru": Eviction(DecayedFrequency, per_layer=True),  # uses that fade with age
    "least-stale": Eviction(LeastStale, per_layer=True),  # passes of the layer that an expert sat through unused
    "activation": Eviction(Activation, per_layer=False),  # MoE-Infinity's
}
# Uses that fade with age, as long as that misses no more than LRU: see guard.py.
NEVER_BELOW_LRU = Eviction(DecayedFrequency, per_layer=True, rival=Recency)


@dataclass(frozen=True)
class Policy:
    """How experts are moved, as a choice of pure parts.

    ``prefill`` and ``decode`` say how a prompt and a decode step bring their experts, ``eviction`` which expert loses
    its slot. With ``keeps`` the experts of a decode step stay in their slots until they are evicted; without, a slot
    may be given away once its expert is computed. ``guesses`` says what a decode step copies of what a predictor
    predicts; ``predictor`` is the kind of it (one of KINDS in predictors/training.py) that replays and evaluate take,
    None where no guesses are made.
    """

    name: str
    prefill: PrefillFetch
    decode: DecodeFetch
    eviction: Eviction = EVICTIONS["lru"]
    keeps: bool = True
    predictor: str | None = None
    guesses: GuessMode = GuessMode.NONE

    @property
    def all_resident(self) -> bool:
        """Whether every expert must be in a slot before the first pass."""
        return self.decode is DecodeFetch.RESIDENT

    def without_guesses(self) -> Policy:
        """The same without prefetches in decode."""
        return replace(self, predictor=None, guesses=GuessMode.NONE)

    def looks_ahead(self, phase: Phase) -> bool:
        """Whether plans of this phase need to know which experts of other layers are present."""
        if phase is Phase.PREFILL:
            return self.prefill is PrefillFetch.NEXT_LAYER or self.prefill.has_ring
        return self.decode is DecodeFetch.NEXT_LAYER


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("resident", PrefillFetch.RESIDENT, DecodeFetch.RESIDENT),
        Policy("on-demand", PrefillFetch.ON_DEMAND, DecodeFetch.ON_DEMAND, keeps=False),
        Policy("layer-prefetch", PrefillFetch.NEXT_LAYER, DecodeFetch.NEXT_LAYER, keeps=False),
        Policy("lru", PrefillFetch.OVERLAP, DecodeFetch.CACHE),
        Policy(
            "activation-matrix",
            PrefillFetch.OVERLAP,
            DecodeFetch.CACHE,
            EVICTIONS["activation"],
            predictor="activation-matrix",
            guesses=GuessMode.TOP_K,
        ),
        Policy(
            "lookahead",
            PrefillFetch.OVERLAP,
            DecodeFetch.CACHE,
            EVICTIONS["lfru"],
            predictor="lookahead",
            guesses=GuessMode.TOP_K,
        ),
        Policy(
            "duoserve-paper",
            PrefillFetch.TWO_BUFFERS,
            DecodeFetch.CACHE,
            keeps=False,
            predictor="paper",
            guesses=GuessMode.TOP_K,
        ),
        Policy(
            "duoserve",
            PrefillFetch.OVERLAP,
            DecodeFetch.CACHE,
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
