"""What a service and who asks it agree on: what may be asked, when objectives are met, which end's reason counts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from duoserve.errors import ConfigError, RequestError
from duoserve.interface import FinishReason, Objectives, ServiceSettings
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


@pytest.mark.parametrize(
    "seconds",
    ["2", True, 0, -1.0, float("nan"), float("inf"), [1.0], pytest.param(10**5000, id="no float, and no text either")],
    ids=repr,
)
@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
def test_an_objective_that_is_no_time_is_refused(name: str, seconds: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is .+, but must be a finite number of seconds above 0, or None$"):
        Objectives(**{name: seconds})


@pytest.mark.parametrize("seconds", [2, np.float32(2), np.int64(2), Fraction(2)], ids=repr)
def test_an_objective_may_be_a_number_of_any_kind(seconds: Any) -> None:
    hopes = Objectives(tpot_s=seconds)
    assert hopes == Objectives(tpot_s=2.0) and type(hopes.tpot_s) is float


def test_integers_of_numpy_are_settings_too() -> None:
    settings = ServiceSettings(max_batch=np.int64(4), max_waiting=np.int64(8), answer_room=np.int64(64))
    assert {type(value) for value in (settings.max_batch, settings.max_waiting, settings.answer_room)} == {int}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0, but must be an integer of at least 1"),
        ({"max_batch": True}, "max_batch is True, but must be an integer"),
        ({"max_waiting": -1}, "max_waiting is -1, but must be an integer of at least 0"),
        ({"max_waiting": "9"}, "max_waiting is '9', but must be an integer"),
        ({"answer_room": 0}, "answer_room is 0, but must be an integer of at least 1"),
        ({"answer_room": 64.5}, "answer_room is 64.5, but must be an integer"),
        ({"objectives": 2.0}, "objectives is 2.0, but must be Objectives"),
        ({"admission": "never"}, "admission='never' is not known: use one of 'late', 'strict'"),
        ({"scheduler": "lifo"}, "scheduler='lifo' is not known: use one of 'slo', 'fcfs'"),
    ],
    ids=str,
)
def test_settings_that_no_service_can_have_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceSettings(**wrong)
