"""How a prefill brings its experts: nearly all are wanted, so they stream through few slots in the layers' order."""

from __future__ import annotations

from itertools import islice

from duoserve.scheduling.plan import LayerPlan, LayerView, ModelShape, PrefillMode

# One slot is computed on, two are being filled (a copy thread each), and one holds what is computed next.
RING_SLOTS = 4
# Below this expected share of experts that will be wanted, speculative copies cost the link more than they save.
SPECULATION_SHARE = 0.75


def ring_size(num_slots: int, num_absent: int) -> int:
    """Slots that a prefill streams through, when ``num_absent`` experts of the model are in none."""
    return min(RING_SLOTS, num_slots, num_absent)


def active_share(shape: ModelShape, num_tokens: int) -> float:
    """The share of a layer's experts that ``num_tokens`` tokens are expected to use, had they no preferences."""
    return 1 - (1 - shape.top_k / shape.num_experts) ** num_tokens


def plan_prefill(mode: PrefillMode, view: LayerView, shape: ModelShape) -> LayerPlan:
    """What to copy, what to speculate on and what to keep, once a layer of a prompt has been routed."""
    if mode is PrefillMode.OVERLAP:
        return _overlap(view, shape)
    if mode is PrefillMode.NEXT_LAYER:
        ahead = shape.after(view.layer)[:1]
        return LayerPlan(view.layer, view.demand(), tuple(view.absent(shape.experts(ahead))), ahead=ahead)
    return LayerPlan(view.layer, view.demand(), overlap=mode is not PrefillMode.ON_DEMAND)


def _overlap(view: LayerView, shape: ModelShape) -> LayerPlan:
    ahead = shape.after(view.layer)
    speculate = active_share(shape, view.num_tokens) >= SPECULATION_SHARE
    prefetch = islice(view.absent(shape.experts(ahead)), view.ring.may_prefetch if speculate else 0)
    passing = [expert for expert in view.wanted if expert not in view.ring.settled]
    keep = frozenset(passing[: view.ring.may_keep])
    return LayerPlan(view.layer, view.demand(), tuple(prefetch), keep, ahead)
