"""The named bundles of pure parts: how prefill streams, how decode brings what it misses, what eviction picks."""

from __future__ import annotations

from dataclasses import dataclass

from duoserve.config import Phase
from duoserve.errors import ConfigError
from duoserve.scheduling.eviction import Eviction, least_recent
from duoserve.scheduling.plan import DecodeMode, PrefillMode

LAYER_LRU = Eviction(pick=least_recent, per_layer=True)


@dataclass(frozen=True)
class Policy:
    """How experts are moved. ``keeps``: an expert stays in its slot after its layer, until it is evicted."""

    name: str
    prefill: PrefillMode
    decode: DecodeMode
    eviction: Eviction = LAYER_LRU
    keeps: bool = True

    @property
    def all_resident(self) -> bool:
        """Whether every expert must be in a slot before the first pass."""
        return self.decode is DecodeMode.RESIDENT

    def looks_ahead(self, phase: Phase) -> bool:
        """Whether plans of this phase need to know which experts of other layers are present."""
        if phase is Phase.PREFILL:
            return self.prefill in (PrefillMode.NEXT_LAYER, PrefillMode.OVERLAP)
        return self.decode is DecodeMode.NEXT_LAYER


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("resident", PrefillMode.RESIDENT, DecodeMode.RESIDENT),
        Policy("on-demand", PrefillMode.ON_DEMAND, DecodeMode.ON_DEMAND, keeps=False),
        Policy("layer-prefetch", PrefillMode.NEXT_LAYER, DecodeMode.NEXT_LAYER, keeps=False),
        Policy("lru", PrefillMode.OVERLAP, DecodeMode.CACHE),
    )
}


def get_policy(name: str) -> Policy:
    """The policy of that name; ConfigError with the names there are for any other."""
    if name not in POLICIES:
        raise ConfigError(f"policy={name!r} is not known: use one of {', '.join(map(repr, POLICIES))}")
    return POLICIES[name]
