"""What a request cost: the lanes, the tokens, the bytes, and how they are shown."""

from __future__ import annotations

import json
import math

import pytest

from duoserve.config import Phase
from duoserve.metrics import ByteCounts, Meter, Stats, percentile


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> Meter:
    return Meter(clock)


def test_a_stall_interrupts_the_computation(clock: Clock, meter: Meter) -> None:
    meter.begin_request()
    with meter.compute():
        clock.advance(2)
        with meter.stall():
            clock.advance(5)
            meter.copied(101.0, 107.0, 10)
        clock.advance(1)
    clock.advance(0.5)
    meter.end_request()
    clock.advance(9)
    stats = meter.snapshot()
    assert (stats.wall_s, stats.compute_s, stats.stall_s) == (8.5, 3.0, 5.0)
    assert (stats.transfer_s, stats.overlap_s) == (6.0, 1.0)


def test_what_the_device_waited_is_a_stall_and_no_overlap(clock: Clock, meter: Meter) -> None:
    """It is heard of only behind the computation, and the copy that it waited for is still heard of later."""
    meter.begin_request()
    with meter.compute():
        clock.advance(10)
    meter.stalled(100.5, 109.0)
    meter.copied(100.0, 109.0, 10)
    stats = meter.snapshot()
    assert (stats.compute_s, stats.stall_s, stats.transfer_s, stats.overlap_s) == (1.5, 8.5, 9.0, 0.5)


def test_what_the_device_waited_before_the_request_is_none_of_its_stalls(clock: Clock, meter: Meter) -> None:
    clock.advance(1)
    meter.begin_request()
    meter.stalled(10.0, 20.0)
    with meter.compute():
        clock.advance(2)
    meter.stalled(100.0, 101.5)
    clock.advance(1)
    meter.stalled(103.5, 104.0)  # when nothing was computed
    meter.end_request()
    stats = meter.snapshot()
    assert (stats.compute_s, stats.stall_s, stats.wall_s) == (1.5, 0.5, 3.0)


@pytest.mark.parametrize("told", ["at once", "at the end"])
def test_a_second_in_which_host_and_device_waited_is_one_of_stall(told: str, clock: Clock, meter: Meter) -> None:
    """The host waits for a read from the disk while the compute lane waits for the copy of the one before."""
    stalls = [(250.0, 264.0), (400.0, 414.0)]
    meter.begin_request()
    with meter.compute():
        with meter.stall():
            clock.advance(150)
        clock.advance(0.25)
        with meter.stall():
            clock.advance(149.75)
        if told == "at once":
            meter.stalled(*stalls[0])
        clock.advance(15)
        if told == "at once":
            meter.stalled(*stalls[1])
    if told == "at the end":
        for stall in stalls:
            meter.stalled(*stall)
    meter.end_request()
    stats = meter.snapshot()
    assert (stats.compute_s, stats.stall_s, stats.wall_s) == (1.0, 314.0, 315.0)


def test_the_clocks_of_host_and_device_part(clock: Clock, meter: Meter) -> None:
    """A stall may seem to end, or even to begin, a little after it is told of."""
    meter.begin_request()
    with meter.compute():
        clock.advance(2)
        meter.stalled(101.0, 102.5)
        meter.stalled(102.25, 102.5)
    assert (meter.snapshot().compute_s, meter.snapshot().stall_s) == (1, 1)


def test_open_sections_count_up_to_the_snapshot(clock: Clock, meter: Meter) -> None:
    meter.begin_request()
    with meter.compute():
        clock.advance(2)
        meter.copied(101.0, 102.0, 1)
        assert (meter.snapshot().compute_s, meter.snapshot().overlap_s, meter.snapshot().wall_s) == (2, 1, 2)
        with meter.stall():
            clock.advance(3)
            assert (meter.snapshot().compute_s, meter.snapshot().stall_s) == (2, 3)
    assert (meter.snapshot().compute_s, meter.snapshot().stall_s) == (2, 3)


def test_an_exception_closes_both_sections(clock: Clock, meter: Meter) -> None:
    with pytest.raises(ZeroDivisionError), meter.compute(), meter.stall():
        clock.advance(1)
        raise ZeroDivisionError
    clock.advance(7)
    assert (meter.snapshot().compute_s, meter.snapshot().stall_s) == (0, 1)


def test_a_new_request_starts_from_nothing(clock: Clock, meter: Meter) -> None:
    meter.begin_request()
    meter.hit(Phase.DECODE)
    meter.token()
    with meter.compute():
        clock.advance(2)
    meter.begin_request()
    clock.advance(1)
    meter.copied(101.0, 103.0, 1)  # began in the request before
    meter.end_request()
    assert meter.snapshot() == Stats(wall_s=1.0, transfer_s=1.0)


@pytest.mark.parametrize("section", ["compute", "stall"])
def test_a_section_that_an_interrupt_left_open_is_none_of_the_next_request(
    section: str, clock: Clock, meter: Meter
) -> None:
    getattr(meter, section)().__enter__()
    meter.begin_request()
    clock.advance(2)
    stats = meter.snapshot()
    assert (stats.wall_s, stats.compute_s, stats.stall_s) == (2, 0, 0)


def test_ttft_and_itl(clock: Clock, meter: Meter) -> None:
    meter.begin_request()
    meter.prompt(7)
    for gap in (3.0, 0.5, 0.25):
        clock.advance(gap)
        meter.token()
    meter.end_request()
    stats = meter.snapshot()
    assert (stats.ttft_s, stats.itl_s, stats.tpot_s) == (3.0, [0.5, 0.25], 0.375)
    assert (stats.prompt_tokens, stats.output_tokens, stats.tokens_per_s) == (7, 3, 0.8)


def test_sequences_in_a_batch_are_timed_apart(clock: Clock, meter: Meter) -> None:
    meter.begin_request()
    for _ in range(3):
        for sequence in ("a", "b"):
            clock.advance(1)
            meter.token(sequence)
    stats = meter.snapshot()
    assert (stats.ttft_s, stats.itl_s, stats.output_tokens) == (1.5, [2, 2, 2, 2], 6)


def test_a_slow_caller_costs_the_request_nothing(clock: Clock, meter: Meter) -> None:
    meter.begin_request()
    for _ in range(3):
        clock.advance(1)
        meter.token()
        with meter.idle():
            clock.advance(50)
            assert meter.snapshot().wall_s < 50
    meter.end_request()
    stats = meter.snapshot()
    assert (stats.wall_s, stats.ttft_s, stats.itl_s) == (3.0, 1.0, [1.0, 1.0])


def test_hit_rates(meter: Meter) -> None:
    assert meter.snapshot().hit_rate() is None
    meter.hit(Phase.PREFILL, 3)
    meter.miss(Phase.PREFILL)
    meter.miss(Phase.DECODE, 2)
    stats = meter.snapshot()
    assert [stats.hit_rate(Phase.PREFILL), stats.hit_rate(Phase.DECODE), stats.hit_rate()] == [0.75, 0.0, 0.5]


def test_bytes_by_class(meter: Meter) -> None:
    meter.bytes.demanded += 1
    meter.bytes.prefetched_useful += 10
    meter.bytes.prefetched_late += 100
    meter.bytes.wasted += 1000
    assert meter.snapshot().bytes == ByteCounts(1, 10, 100, 1000)
    assert meter.snapshot().bytes.total == 1111
    with pytest.raises(AttributeError):
        meter.bytes.lost += 1


def test_byte_counts_are_added_and_subtracted_class_by_class() -> None:
    more, less = ByteCounts(11, 22, 33, 44), ByteCounts(1, 2, 3, 4)
    assert more - less == ByteCounts(10, 20, 30, 40)
    assert more + less == ByteCounts(12, 24, 36, 48)


def test_a_snapshot_does_not_change_any_more(clock: Clock, meter: Meter) -> None:
    meter.begin_request()
    before = meter.snapshot()
    meter.hit(Phase.DECODE)
    meter.bytes.demanded += 5
    for _ in range(2):
        meter.token()
    assert before == Stats()


def filled() -> Stats:
    return Stats(
        ttft_s=0.5,
        itl_s=[0.25, 0.75],
        prompt_tokens=4,
        output_tokens=3,
        hits={"prefill": 0, "decode": 3},
        misses={"prefill": 0, "decode": 1},
        bytes=ByteCounts(2_000_000, 1, 2, 3),
        wall_s=1.5,
    )


def test_to_dict_is_flat_and_complete() -> None:
    flat = filled().to_dict()
    assert json.loads(json.dumps(flat)) == flat
    assert all(not isinstance(value, dict) for value in flat.values())
    expected = {
        "tpot_s": 0.5,
        "tokens_per_s": 2.0,
        "hit_rate": 0.75,
        "hit_rate_prefill": None,
        "misses_decode": 1,
        "bytes_demanded": 2_000_000,
        "bytes_total": 2_000_006,
        "wall_s": 1.5,
        "stall_s": 0.0,
    }
    assert flat.items() >= expected.items()


def test_the_table_is_aligned() -> None:
    lines = str(filled()).splitlines()
    assert "hit rate              prefill -, decode 75.0 %" in lines
    assert "MB demanded           2.0" in lines
    assert "TPOT                  0.5000 s" in lines
    assert str(Stats()).count("\n") == len(lines) - 1


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2), (75, 3), (76, 4), (100, 4)])
def test_percentiles_are_of_the_values(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == value
    assert math.isnan(percentile([], percent))
