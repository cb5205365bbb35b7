"""How a prefill brings its experts: nearly all are wanted, so they stream through few slots in the layers' order."""

from __future__ import annotations

from itertools import islice

from duoserve.scheduling.plan import LayerPlan, LayerView, ModelShape, PrefillFetch

# One slot is computed on, two are being filled (a copy thread each), and one holds what is computed next.
RING_SLOTS = 4
# The paper's: one is computed on, one is filled.
TWO_BUFFERS = 2
# While attention is computed no slot comes free, and what the link brings meanwhile needs room: the more, the longer
# the prompt is, and the smaller the experts are, of which a layer has more then. With a slot for each 8192 of tokens x
# experts of a layer, a virtual A5000 on a 50 GB/s link gets 8192 tokens through Qwen3-30B-A3B in FP8 in the
# time of the bound, with slots for 5 to 25 % of the experts; with half as many it takes up to 1.21 times that.
TOKENS_X_EXPERTS_PER_SLOT = 8192
# What decode steps have gathered must survive: no more than this share of the slots goes to that room. A slot more
# saves such a prompt a copy in every layer, and what is given up for it costs one copy at most, if it was worth one:
# decode steps behind the prompt are no slower (bench/LOG.md).
RING_SHARE = 1 / 2
# Below this expected share of experts that will be wanted, speculative copies cost the link more than they save.
SPECULATION_SHARE = 0.75


def ring_size(mode: PrefillFetch, shape: ModelShape, num_tokens: int, num_slots: int, num_absent: int) -> int:
    """Slots that a prefill of ``num_tokens`` streams through, when ``num_absent`` experts of the model are in none."""
    if mode is PrefillFetch.TWO_BUFFERS:
        return min(TWO_BUFFERS, num_slots, num_absent)
    wished = RING_SLOTS + num_tokens * shape.num_experts // TOKENS_X_EXPERTS_PER_SLOT
    granted = max(RING_SLOTS, int(RING_SHARE * num_slots))
    return min(wished, granted, num_slots, num_absent)


def active_share(shape: ModelShape, num_tokens: int) -> float:
    """The share of a layer's experts that ``num_tokens`` tokens are expected to use, had they no preferences."""
    return 1 - (1 - shape.top_k / shape.num_experts) ** num_tokens


def plan_prefill(mode: PrefillFetch, view: LayerView, shape: ModelShape) -> LayerPlan:
    """What to copy, what to speculate on and what to keep, once a layer of a prompt has been routed."""
    if mode.has_ring:
        every = mode is PrefillFetch.TWO_BUFFERS or active_share(shape, view.num_tokens) >= SPECULATION_SHARE
        return _overlap(view, shape, every)
    if mode is PrefillFetch.NEXT_LAYER:
        ahead = shape.after(view.layer)[:1]
        return LayerPlan(view.layer, view.demand(), tuple(view.absent(shape.experts(ahead))), ahead=ahead)
    return LayerPlan(view.layer, view.demand(), overlap=mode is not PrefillFetch.ON_DEMAND)


def _overlap(view: LayerView, shape: ModelShape, speculate: bool) -> LayerPlan:
    ahead = shape.after(view.layer)
    prefetch = islice(view.absent(shape.experts(ahead)), view.ring.may_prefetch if speculate else 0)
    passing = [expert for expert in view.wanted if expert not in view.ring.settled]
    keep = frozenset(passing[: view.ring.may_keep])
    return LayerPlan(view.layer, view.demand(), tuple(prefetch), keep, ahead)
