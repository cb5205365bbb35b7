"""What happens when, with a GPU's numbers and real models' shapes: bounds are reached, and nobody is in anybody's way.

c seconds for an expert on the link, A for a layer up to its router's choice, X for an expert's computation, L layers,
E experts of which a token takes K.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.config import Phase
from duoserve.experts.tickets import PIECE_BYTES
from duoserve.scheduling.plan import PrefillFetch
from duoserve.scheduling.policies import POLICIES
from duoserve.scheduling.prefill import ring_size
from tests.scheduling.gpu_rig import MIXTRAL, QWEN3, Device, GpuRig, Shape
from tests.scheduling.recording import (
    Carried,
    busy_share,
    clashes,
    misreadings,
    misshapen,
    overtakings,
    was_prefetch,
)
from tests.scheduling.rig import Routing

FAST = Device(flops=400e12, memory=3.0e12)  # what an H100 reaches
SLOW = Device(flops=60e12, memory=0.7e12)  # what an A5000 reaches

models = pytest.mark.parametrize("shape", [MIXTRAL, QWEN3], ids=["mixtral", "qwen3"])
links = pytest.mark.parametrize("link", [25e9, 50e9], ids=["25GB/s", "50GB/s"])


def slots_for(shape: Shape, share: float = 0.125) -> int:
    return int(share * shape.layers * shape.experts)


def assert_orderly(rig: GpuRig) -> None:
    """No demand waits for more than the one piece that is under way, and no slot is written while it is read."""
    assert overtakings(rig.engine, rig.reads) == []
    assert clashes(rig.engine, rig.reads) == []
    assert misreadings(rig.engine, rig.reads) == []
    assert misshapen(rig.engine) == []


class TestPrefill:
    @models
    @links
    @pytest.mark.parametrize(("device", "tokens"), [(FAST, 2048), (FAST, 8192), (SLOW, 2048), (SLOW, 8192)])
    def test_it_takes_what_the_link_or_the_computation_takes(
        self, shape: Shape, link: float, device: Device, tokens: int
    ) -> None:
        rig = GpuRig("lru", shape, slots_for(shape), link)
        attention_s, expert_s = device.attention(shape, tokens), device.expert(shape, tokens)
        ttft_s = rig.run(Phase.PREFILL, shape.all_experts(), tokens, attention_s, expert_s)
        link_s = shape.layers * shape.experts * rig.copy_s
        compute_s = shape.layers * (attention_s + shape.experts * expert_s)
        assert max(link_s, compute_s) <= ttft_s <= 1.05 * max(link_s, compute_s)
        if link_s > compute_s:
            assert busy_share(rig.engine.log) >= 0.95
        assert_orderly(rig)

    @models
    @links
    def test_what_decode_steps_left_in_the_slots_is_not_copied_again(self, shape: Shape, link: float) -> None:
        rig = GpuRig("lru", shape, slots_for(shape), link)
        tokens, rng = 2048, random.Random(1)
        for _ in range(20):
            wanted = [rng.sample(range(shape.experts), shape.top_k) for _ in range(shape.layers)]
            rig.run(Phase.DECODE, wanted, 1, FAST.attention(shape, 1), FAST.expert(shape, 1))
        assert len(rig.table.ready()) == rig.table.num_slots
        before = len(rig.engine.tickets), len(rig.engine.log)
        attention_s, expert_s = FAST.attention(shape, tokens), FAST.expert(shape, tokens)
        ttft_s = rig.run(Phase.PREFILL, shape.all_experts(), tokens, attention_s, expert_s)
        copies = len(rig.engine.tickets) - before[0]
        total = shape.layers * shape.experts
        ring = ring_size(PrefillFetch.OVERLAP, shape.of_model(), tokens, rig.table.num_slots, total)
        assert copies <= total - (rig.table.num_slots - ring) and ring <= 0.2 * rig.table.num_slots
        assert ttft_s <= 1.05 * copies * rig.copy_s
        assert busy_share(rig.engine.log[before[1] :]) >= 0.95
        assert_orderly(rig)

    @links
    @pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
    def test_few_slots_cost_what_the_link_cannot_bring_during_attention(self, share: float, link: float) -> None:
        """While attention is computed no slot comes free: the ring is all that the link can fill meanwhile."""
        shape, tokens, slots = QWEN3, 8192, slots_for(QWEN3, share)
        rig = GpuRig("lru", shape, slots, link)
        attention_s, expert_s = SLOW.attention(shape, tokens), SLOW.expert(shape, tokens)
        ttft_s = rig.run(Phase.PREFILL, shape.all_experts(), tokens, attention_s, expert_s)
        ring = ring_size(PrefillFetch.OVERLAP, shape.of_model(), tokens, slots, shape.layers * shape.experts)
        assert ring <= slots // 2
        brought = min(ring, attention_s / rig.copy_s)
        left_s = max(shape.experts * expert_s, (shape.experts - brought) * rig.copy_s)
        bound_s = shape.layers * max(shape.experts * rig.copy_s, attention_s + left_s)
        assert ttft_s <= 1.05 * bound_s
        assert_orderly(rig)


def token(shape: Shape, misses: Callable[[int], int], parity: int) -> Routing:
    """A token that shares all but ``misses(layer)`` experts of each layer with the one before, of the other parity."""
    routing = []
    for layer in range(shape.layers):
        new, kept = misses(layer), shape.top_k - misses(layer)
        first = kept + parity * new
        routing.append([*range(kept), *range(first, first + new)])
    return routing


HAND_MADE = {
    "all hits": lambda shape: lambda layer: 0,
    "all misses": lambda shape: lambda layer: shape.top_k,
    "half of each layer misses": lambda shape: lambda layer: shape.top_k // 2,
    "one layer misses": lambda shape: lambda layer: shape.top_k if layer == shape.layers // 2 else 0,
}


class TestDecode:
    @models
    @links
    @pytest.mark.parametrize("device", [FAST, SLOW], ids=["fast", "slow"])
    @pytest.mark.parametrize("case", HAND_MADE)
    def test_a_token_takes_what_its_misses_and_its_computation_take(
        self, case: str, shape: Shape, link: float, device: Device
    ) -> None:
        misses = HAND_MADE[case](shape)
        rig = GpuRig("lru", shape, shape.layers * shape.top_k, link)
        attention_s, expert_s = device.attention(shape, 1), device.expert(shape, 1)
        for parity in (0, 1, 0, 1):
            tpot_s = rig.run(Phase.DECODE, token(shape, misses, parity), 1, attention_s, expert_s)
        # Hits are computed while the first miss is copied, each miss but the last while the next one is. So a layer
        # takes A + K X without misses, and A + m c + X with m of them, if its computation is shorter than a copy.
        assert shape.top_k * expert_s <= rig.copy_s
        bound_s = sum(
            attention_s + (misses(layer) * rig.copy_s + expert_s if misses(layer) else shape.top_k * expert_s)
            for layer in range(shape.layers)
        )
        assert 0.9999 * bound_s <= tpot_s <= 1.02 * bound_s
        assert_orderly(rig)

    @models
    @links
    def test_wrong_guesses_cost_a_token_at_most_a_piece_a_layer(self, shape: Shape, link: float) -> None:
        """Whole layers are guessed, in order, and the last experts are wanted, which come late or not at all."""
        last = [list(range(shape.experts - shape.top_k, shape.experts))] * shape.layers
        rigs = [GpuRig(policy, shape, 2 * shape.experts, link) for policy in ("on-demand", "layer-prefetch")]
        attention_s, expert_s = FAST.attention(shape, 1), FAST.expert(shape, 1)
        for _ in range(2):
            without_s, with_s = (rig.run(Phase.DECODE, last, 1, attention_s, expert_s) for rig in rigs)
        copies_s = shape.top_k * rigs[0].copy_s
        assert without_s == pytest.approx(shape.layers * (attention_s + copies_s + shape.top_k * expert_s))
        assert with_s <= without_s + shape.layers * PIECE_BYTES / link
        assert_orderly(rigs[1])


class TestGuesses:
    @models
    @links
    @pytest.mark.parametrize("phase", Phase)
    def test_demands_wait_for_one_piece_and_slots_for_their_readers(
        self, shape: Shape, link: float, phase: Phase
    ) -> None:
        rig = GpuRig("layer-prefetch", shape, 2 * shape.experts, link)
        rng = random.Random(2)
        tokens, width = (2048, shape.experts // 2) if phase is Phase.PREFILL else (1, shape.top_k)
        for _ in range(2):
            wanted = [rng.sample(range(shape.experts), width) for _ in range(shape.layers)]
            rig.run(phase, wanted, tokens, SLOW.attention(shape, tokens), SLOW.expert(shape, tokens))
        assert_orderly(rig)
        delays = pieces_in_the_way(rig)
        assert delays  # the rule was put to the test
        assert max(one.stop - one.start for one in delays) <= PIECE_BYTES / link * 1.0001

    def test_what_was_moved_of_a_wrong_guess_is_wasted_and_its_slot_is_free_at_once(self) -> None:
        rig = GpuRig("layer-prefetch", Shape(2, 4, 1, 10, 0, 0), slots=4, link=1.0, piece_bytes=4)
        rig.run(Phase.PREFILL, [[3], [3]], 1, attention_s=5.0, expert_s=0.0)
        layer_0 = [ticket for ticket in rig.engine.tickets if ticket.expert.layer == 0]
        assert [ticket.state.value for ticket in layer_0] == ["cancelled", "cancelled", "cancelled", "done"]
        # At 5 the second piece of the wrong guess was on the link, and the third will never be.
        assert [(one.start, one.stop, one.ticket) for one in rig.engine.log[:3]] == [
            (0.0, 4.0, layer_0[0]),
            (4.0, 8.0, layer_0[0]),
            (8.0, 18.0, layer_0[3]),
        ]
        assert {ticket.slot: ticket.issued_at for ticket in rig.engine.tickets[4:]}[layer_0[0].slot] == 5.0
        bytes_by_class = rig.meter.snapshot().bytes
        assert (bytes_by_class.wasted, bytes_by_class.prefetched_late, bytes_by_class.demanded) == (2 * 8, 2 * 10, 0)


def pieces_in_the_way(rig: GpuRig) -> list[Carried]:
    """The pieces of prefetches during which a demand was made."""
    demanded = sorted(rig.engine.demanded_at.values())
    prefetched = [one for one in rig.engine.log if was_prefetch(rig.engine, one)]
    return [one for one in prefetched if bisect_left(demanded, one.stop) > bisect_right(demanded, one.start)]


SECONDS = st.sampled_from([0.0, 0.5, 3.0, 11.0, 40.0])


@st.composite
def passes(draw: st.DrawFn) -> list[tuple[Phase, Routing, int, float, float]]:
    """Forward passes of a model of 3 layers of 6 experts."""
    wanted = st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True)
    routing = st.lists(wanted, min_size=3, max_size=3)
    one = st.tuples(st.sampled_from(Phase), routing, st.sampled_from([1, 100]), SECONDS, SECONDS)
    return draw(st.lists(one, min_size=1, max_size=4))


@given(
    policy=st.sampled_from(sorted(set(POLICIES) - {"resident"})),
    slots=st.integers(1, 18),
    piece_bytes=st.sampled_from([None, 1, 3, 4, 10]),
    shuffle=st.sampled_from([None, 1, 2]),
    steps=passes(),
)
@settings(max_examples=300, deadline=None)
def test_no_slot_is_rewritten_before_its_readers_have_ended(
    policy: str,
    slots: int,
    piece_bytes: int | None,
    shuffle: int | None,
    steps: list[tuple[Phase, Routing, int, float, float]],
) -> None:
    """Copies take ten seconds. A link that shuffles heeds no priority, but slots and pieces all the same."""
    rig = GpuRig(policy, Shape(3, 6, 2, 10, 0, 0), slots, 1.0, piece_bytes, shuffle)
    for step in steps:
        rig.run(*step)
    assert clashes(rig.engine, rig.reads) == []
    assert misreadings(rig.engine, rig.reads) == []
    assert misshapen(rig.engine) == []
    if shuffle is None:
        assert overtakings(rig.engine, rig.reads) == []
