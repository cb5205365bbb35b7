"""What a plan is made from and what it says: plain data, so that planning is a pure function."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from duoserve.config import ModelConfig
from duoserve.experts.layout import ExpertId

# The layer of a view before the first layer has been routed, when nothing is wanted yet.
BEFORE_FIRST = -1


class PrefillFetch(Enum):
    """How a prefill brings its experts."""

    RESIDENT = "resident"  # all of them are in slots
    ON_DEMAND = "on-demand"  # after the routing, and computed when all have come
    NEXT_LAYER = "next-layer"  # the whole next layer while this one computes
    OVERLAP = "overlap"  # streamed through a ring of few slots, several layers ahead if need be
    TWO_BUFFERS = "two-buffers"  # one by one through two slots, as if every expert were wanted

    @property
    def has_ring(self) -> bool:
        """Whether experts stream through a ring of slots."""
        return self in (PrefillFetch.OVERLAP, PrefillFetch.TWO_BUFFERS)


class DecodeFetch(Enum):
    """How a decode step brings its experts."""

    RESIDENT = "resident"
    ON_DEMAND = "on-demand"
    NEXT_LAYER = "next-layer"
    CACHE = "cache"  # misses on demand, computed as they come, kept until evicted


class GuessMode(Enum):
    """What a decode step copies of what its predictor says about the next layers."""

    NONE = "none"
    TOP_K = "top-k"  # the likeliest top_k of each, whatever that costs
    BUDGET = "budget"  # what pays: see foresight.py


@dataclass(frozen=True)
class ModelShape:
    """Each of ``layers`` (those that have experts, in order) has ``num_experts``, of which a token takes ``top_k``."""

    num_experts: int
    top_k: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> ModelShape:
        """The shape of a model."""
        return cls(config.num_experts, config.top_k, config.moe_layers)

    @property
    def total_experts(self) -> int:
        """Experts of the whole model."""
        return self.num_experts * len(self.layers)

    @property
    def depth(self) -> int:
        """Rows of a table by layer: the last layer with experts, plus one."""
        return self.layers[-1] + 1

    def after(self, layer: int) -> tuple[int, ...]:
        """The layers behind ``layer``, in order; all of them behind BEFORE_FIRST."""
        return tuple(other for other in self.layers if other > layer)

    def experts(self, layers: Sequence[int]) -> Iterator[ExpertId]:
        """All experts of ``layers``, in order."""
        return (ExpertId(layer, expert) for layer in layers for expert in range(self.num_experts))

    def all_experts(self) -> Iterator[ExpertId]:
        """All experts of the model, layer by layer."""
        return self.experts(self.layers)


class RingView(NamedTuple):
    """The slots that a prefill streams through, when a layer asks for its experts.

    ``may_prefetch`` more speculative copies may be queued. The experts of the layer that are ``settled`` were resident
    before and stay; of the others ``may_keep`` may stay behind.
    """

    may_prefetch: int = 0
    settled: frozenset[int] = frozenset()
    may_keep: int = 0


NO_RING = RingView()


class LayerView(NamedTuple):
    """What is known when a layer asks for its experts; ``layer`` may be BEFORE_FIRST.

    ``wanted`` comes most wanted first; ``present`` names by layer the experts that are in a slot or on their way.
    """

    layer: int
    wanted: tuple[int, ...]
    present: Mapping[int, Collection[int]]
    num_tokens: int
    ring: RingView = NO_RING

    def demand(self) -> tuple[int, ...]:
        """The wanted experts that are neither in a slot nor on their way, in the order they are wanted."""
        present = self.present.get(self.layer, ())
        return tuple([expert for expert in self.wanted if expert not in present])

    def absent(self, experts: Iterator[ExpertId]) -> Iterator[ExpertId]:
        """The ``experts`` that are neither in a slot nor on their way."""
        return (expert for expert in experts if expert.expert not in self.present.get(expert.layer, ()))


class Guesses(NamedTuple):
    """What comes of a prediction: copies for the layers ``ahead``, the likeliest first, and experts to be spared."""

    copies: tuple[ExpertId, ...] = ()
    ahead: tuple[int, ...] = ()
    spared: frozenset[ExpertId] = frozenset()


NO_GUESSES = Guesses()


class LayerPlan(NamedTuple):
    """What to do for a layer: copy ``demand`` now, in order, then ``prefetch`` as slots come free.

    ``keep`` names the experts that stay resident once they are computed. ``ahead`` are the layers for which prefetched
    experts are worth their slots, and experts that are ``spared`` stay in theirs as long as there are others. Without
    ``overlap`` all copies are awaited before any expert is computed.
    """

    layer: int
    demand: tuple[int, ...]
    prefetch: tuple[ExpertId, ...] = ()
    keep: frozenset[int] = frozenset()
    ahead: tuple[int, ...] = ()
    overlap: bool = True
    spared: frozenset[ExpertId] = frozenset()
