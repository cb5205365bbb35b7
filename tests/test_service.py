"""What a service and those who ask it agree on: when objectives are met, and which reason of an end counts."""

from __future__ import annotations

import pytest

from duoserve.interface import FinishReason, Objectives
from duoserve.request import Request
from duoserve.sampling import SamplingParams


@pytest.mark.parametrize(
    ("hoped", "took", "met"),
    [
        ((1.0, 0.1), (1.0, 0.1), True),
        ((1.0, 0.1), (1.01, 0.0), False),
        ((1.0, 0.1), (0.0, 0.11), False),
        ((None, 0.1), (9.0, 0.1), True),
        ((1.0, None), (1.0, 9.0), True),
        ((None, None), (9.0, 9.0), True),
        ((1.0, 0.1), (1.0, None), True),
        ((1.0, 0.1), (None, None), True),
        ((1.0, None), (float("inf"), 0.0), False),
    ],
)
def test_objectives_are_met_up_to_their_limits(
    hoped: tuple[float | None, float | None], took: tuple[float | None, float | None], met: bool
) -> None:
    assert Objectives(*hoped).met(*took) is met


@pytest.mark.parametrize(
    ("tokens", "last_token", "attained"),
    [(0, None, False), (1, 3.0, True), (3, 4.0, True), (3, 4.25, False)],
    ids=["no token", "one token", "in time", "slow"],
)
def test_a_request_attains_them_by_its_first_token_and_the_mean_of_the_others(
    tokens: int, last_token: float | None, attained: bool
) -> None:
    request = Request([1], SamplingParams(), [7] * tokens, objectives=Objectives(2.0, 0.5), arrived=1.0)
    request.first_token, request.last_token = last_token and 3.0, last_token
    assert request.attained is attained


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (("stop", "length"), "stop"),
        (("length", "stop"), "stop"),
        (("length", "abort"), "length"),
        (("abort", "stop"), "abort"),
        (("error", "stop"), "error"),
        (("abort", "error"), "abort"),
    ],
)
def test_the_first_reason_stays_unless_a_stop_string_was_completed_by_the_last_token(
    reasons: tuple[FinishReason, FinishReason], expected: FinishReason
) -> None:
    request = Request([1], SamplingParams())
    for reason in reasons:
        request.finish(reason)
    assert request.finish_reason == expected
