"""What a service and those who ask it agree on: which reason of an end counts."""

from __future__ import annotations

import pytest

from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.service import FinishReason


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
