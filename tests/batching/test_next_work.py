"""Which requests to start, how far to take a prefill, which requests to refuse: on plain data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from duoserve.batching.cost import MeasuredCosts
from duoserve.batching.next_work import (
    PATIENCE_S,
    PLANNED,
    STALE_S,
    STEP_S,
    Batching,
    RunningPrefill,
    RunningRequest,
    Traffic,
    WaitingRequest,
)
from duoserve.interface import Objectives, ServiceSettings

LAYERS = 10
SLO, FCFS = ServiceSettings(max_batch=4), ServiceSettings(max_batch=4, scheduler="fcfs")


def batching(settings: ServiceSettings = SLO, *, step_s: float = 0.01, layer_s: float = 0.01) -> Batching:
    """A decode step takes ``step_s`` and a tenth of it for each request, a layer ``layer_s`` for each 100 tokens."""
    costs = MeasuredCosts()
    for size in (1, 11):
        costs.note_decode(size, step_s * (0.9 + 0.1 * size))
        costs.note_prefill(100 * size, 1, layer_s * size)
    return Batching(settings, costs, LAYERS)


def asked(
    arrived: float = 0.0, prompt: int = 100, room: int = 128, ttft_s: float | None = None, left: int = 1
) -> WaitingRequest:
    return WaitingRequest(arrived, prompt, room, Objectives(ttft_s), left=left)


def going(planned_s: float | None = None, tokens: int = 1, left: int = 10) -> RunningRequest:
    """One whose first token came at 0 s, and whose later ones are planned for ``planned_s`` each."""
    return RunningRequest(0.0, tokens, left, 128, planned_s and planned_s / PLANNED)


def traffic(
    waiting: Sequence[WaitingRequest] = (), running: Sequence[RunningRequest] = (), free: int = 10_000, **more: object
) -> Traffic:
    return Traffic(more.pop("now", 0.0), waiting, running, free, **more)


def test_the_least_slack_goes_first_and_arrival_counts_for_nothing_else() -> None:
    waiting = [asked(0.0, ttft_s=9.0), asked(0.1, ttft_s=1.0), asked(0.2, prompt=300, ttft_s=1.05), asked(0.3)]
    assert batching().order(traffic(waiting, now=0.5)) == [2, 1, 0, 3]
    assert batching(FCFS).order(traffic(waiting, now=0.5)) == [0, 1, 2, 3]


def test_what_is_late_already_waits_for_what_can_still_be_in_time_until_its_patience_ends() -> None:
    waiting = [asked(0.0, ttft_s=0.5), asked(0.1, ttft_s=0.5), asked(0.9, ttft_s=1.0), asked(0.95, ttft_s=0.5)]
    assert batching().order(traffic(waiting, now=1.0)) == [3, 2, 0, 1]
    later = [one._replace(arrived=one.arrived + PATIENCE_S) for one in waiting[2:]]
    assert batching().order(traffic([*waiting[:2], *later], now=PATIENCE_S + 1.0)) == [0, 3, 2, 1]  # one at a time


def test_waiting_prompts_share_a_pass_as_long_as_all_are_in_time() -> None:
    waiting = [asked(0.0, ttft_s=0.25), asked(0.0, ttft_s=2.0), asked(0.0, prompt=500, ttft_s=2.0)]
    assert batching().start(traffic(waiting)) == [0, 1]  # 0.2 s for both; the third would make it 0.7 s
    assert batching(FCFS).start(traffic(waiting)) == [0, 1, 2]


def test_the_kv_cache_and_the_batch_bound_what_starts() -> None:
    waiting = [asked(room=128), asked(room=512), asked(room=128)]
    assert batching().start(traffic(waiting, free=300)) == [0, 2]
    assert batching(FCFS).start(traffic(waiting, free=300)) == [0]
    assert len(batching().start(traffic([asked()] * 9))) == 4
    assert len(batching().start(traffic([asked()] * 9, [going()] * 3))) == 1


def test_nobody_overtakes_one_whose_patience_has_ended() -> None:
    waiting = [asked(0.0, room=512), asked(1.0, room=128)]
    assert batching().start(traffic(waiting, free=300, now=PATIENCE_S - 1)) == [1]
    assert batching().start(traffic(waiting, free=300, now=PATIENCE_S)) == []


def test_one_that_was_sent_back_is_patient_from_then_on() -> None:
    waiting = [asked(0.0, room=512)._replace(sent_back=PATIENCE_S), asked(PATIENCE_S, room=128)]
    for settings, start in ((SLO, [1]), (FCFS, [])):
        assert batching(settings).start(traffic(waiting, free=300, now=2 * PATIENCE_S - 1)) == start
    assert batching().start(traffic(waiting, free=300, now=2 * PATIENCE_S)) == []


def test_the_batch_grows_only_as_far_as_later_tokens_stay_in_time() -> None:
    waiting = [asked(prompt=1)] * 4
    assert len(batching(layer_s=1e-9).start(traffic(waiting, [going(0.0121)]))) == 2  # three take 0.012 s a step
    assert len(batching().start(traffic(waiting, [going(0.001)]))) == 3  # which no batch could keep
    ours = [asked()._replace(objectives=Objectives(None, goal)) for goal in (0.0111 / PLANNED, None, None)]
    assert batching().start(traffic(ours)) == [0, 1]  # the third would be too much for the first


def test_tokens_that_came_early_pay_for_a_pass_and_for_a_larger_batch() -> None:
    """Ten layers of 0.01 s; a step of one takes 0.01 s, of two 0.011 s."""
    waiting = [asked()]
    assert batching().start(traffic(waiting, [going(0.02)])) == []  # 0.1 s and ten tokens of 0.011 s are due in 0.2 s
    assert batching().start(traffic(waiting, [going(0.0211)])) == [0]
    assert batching().start(traffic(waiting, [going(0.02, tokens=3)])) == [0]


def test_a_slice_ends_in_time_for_the_next_decode_steps() -> None:
    """A step takes 0.01 s, a layer 0.004 s; four tokens are looked ahead."""
    prefill, slow = RunningPrefill(100, 1, LAYERS), batching(layer_s=0.004)

    def layers(one: RunningRequest, now: float = 0.0, decoded: bool = False) -> int:
        return slow.layers(traffic(running=[one], prefill=prefill, now=now), decoded)

    assert layers(going(0.0141)) == 4  # 4 * (0.0141 - 0.01) s
    assert layers(going(0.0141, left=1)) == 1
    assert layers(going(0.0141, left=1), now=0.003) == layers(going(0.0141, left=1), now=0.003, decoded=True) == 0
    assert layers(going(0.0141, tokens=2, left=1)) == 4  # its last token came 0.0141 s early
    assert layers(going(0.0141), now=0.9) == layers(going()) == LAYERS  # nothing to lose, nothing to keep
    assert Batching(FCFS, slow.costs, LAYERS).layers(traffic(running=[going(0.0101)], prefill=prefill), False) == LAYERS


def test_a_prefill_goes_on_when_its_patience_has_ended() -> None:
    prefill = RunningPrefill(100, 1, LAYERS, arrived=-PATIENCE_S)
    tight = traffic(running=[going(0.01, left=1)], prefill=prefill)
    assert [batching().layers(tight, decoded) for decoded in (False, True)] == [0, 1]
    assert batching().layers(tight._replace(prefill=prefill._replace(arrived=-1.0)), True) == 0


def test_no_slice_is_long_and_the_first_is_one_layer() -> None:
    prefill = RunningPrefill(1000, 1, LAYERS)
    assert batching(layer_s=0.001).layers(traffic(prefill=prefill), decoded=False) == STEP_S / 0.01
    assert batching(layer_s=1.0).layers(traffic(prefill=prefill), decoded=False) == 1
    assert Batching(SLO, MeasuredCosts(), LAYERS).layers(traffic(prefill=prefill), decoded=False) == 1


def test_a_request_is_refused_for_what_is_ahead_of_it() -> None:
    one = batching()
    assert one.refusal(asked(ttft_s=0.15), traffic()) is None
    refused = one.refusal(asked(ttft_s=0.15), traffic([asked()] * 2))
    assert refused is not None and refused.retry_after_s == pytest.approx(0.15, rel=0.01) and "0.3 s" in refused.why
    assert one.refusal(asked(ttft_s=0.15), traffic(prefill=RunningPrefill(100, 1, 9))) is not None
    full = traffic(running=[going(left=50)] * 4)
    refused = one.refusal(asked(ttft_s=0.15), full)
    assert refused is not None and refused.retry_after_s == pytest.approx(50 * 0.013 - 0.05, rel=0.01)
    assert one.refusal(asked(), full) is None
    assert one.refusal(WaitingRequest(0.0, 1, 1, Objectives(None, 0.005)), traffic()) is not None
    unmeasured = Batching(SLO, MeasuredCosts(), LAYERS)
    assert unmeasured.refusal(asked(ttft_s=0.001), full) is None


def test_what_a_request_has_waited_counts_for_its_objective_but_not_for_its_next_try() -> None:
    one, request = batching(), asked(ttft_s=0.15)
    assert one.first_token_s(request, traffic(now=0.1)) == pytest.approx(0.1, rel=0.01)
    assert one.refusal(request, traffic(now=0.04)) is None
    refused = one.refusal(request, traffic(now=0.1))
    assert refused is not None and refused.retry_after_s == 0.1 and "after 0.2 s" in refused.why


def test_where_nobody_is_there_an_old_measurement_refuses_nobody() -> None:
    one, now = batching(), 2 * STALE_S
    hopeless = [asked(now, ttft_s=0.01), asked(now)._replace(objectives=Objectives(None, 0.005))]
    for request in hopeless:
        assert one.refusal(request, traffic(now=now, measured=now - 0.5 * STALE_S)) is not None
        assert one.refusal(request, traffic(now=now, measured=now - 1.1 * STALE_S)) is None
        for busy in ({"waiting": [asked()]}, {"running": [going()]}, {"prefill": RunningPrefill(100, 1, LAYERS)}):
            assert one.refusal(request, traffic(now=now, measured=0.0, **busy)) is not None


def test_those_that_wait_take_seats_from_each_other() -> None:
    """Four run at a time, 0.013 s a step: every four of those that wait are another batch of 50 steps."""
    one, full = batching(), [going(left=50)] * 4
    begun = one.first_token_s(asked(), traffic([asked(left=50)] * 3, full)) - 4 * 0.1
    assert begun == pytest.approx(50 * 0.013, rel=0.01)
    for num_waiting, batches in ((4, 1), (7, 1), (8, 2), (16, 4)):
        waiting, prefill_s = [asked(left=50)] * num_waiting, (num_waiting + 1) * 0.1
        for running, before in ((full, 1), ([], 0)):
            expected = one.first_token_s(asked(), traffic(waiting, running)) - prefill_s
            assert expected == pytest.approx((batches + before) * 50 * 0.013, rel=0.01)


def test_those_that_wait_and_those_that_are_prefilled_give_their_room_back() -> None:
    prefill = RunningPrefill(100, 1, 0, room=128, left=20)
    waits = [asked(left=30)]
    for behind, expected in (
        (traffic(waits, free=128), 30 * 0.01 + 2 * 0.1),
        (traffic(free=0, prefill=prefill), 20 * 0.01 + 0.1),
        (traffic(waits, free=0, prefill=prefill), (20 + 30) * 0.011 + 2 * 0.1),
    ):
        assert batching().first_token_s(asked(), behind) == pytest.approx(expected, rel=0.01)


def test_a_request_that_the_batch_has_no_seat_for_in_time_is_refused() -> None:
    """By its objective for later tokens three may run: four take 0.013 s a step."""
    hopes = Objectives(0.3, 0.0121 / PLANNED)
    one, request = batching(), asked()._replace(objectives=hopes)
    assert one.refusal(request, traffic(running=[going(left=50)] * 2)) is None
    refused = one.refusal(request, traffic(running=[going(left=50)] * 3))
    assert refused is not None and refused.retry_after_s == pytest.approx(50 * 0.012 + 0.1 - 0.3, rel=0.01)
    assert Batching(FCFS, one.costs, LAYERS).refusal(request, traffic(running=[going(left=50)] * 3)) is None


def test_one_that_has_just_what_is_planned_is_not_given_up() -> None:
    """It joined a batch whose step takes all that is planned for a token, and a moment of it has passed."""
    prefill = RunningPrefill(100, 1, LAYERS)
    assert batching().layers(traffic((), [going(0.01)], now=0.001, prefill=prefill), decoded=True) == 0
    assert batching().start(traffic([asked(prompt=1)], [going(0.01)], now=0.001)) == []
