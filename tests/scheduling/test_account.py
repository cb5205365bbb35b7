"""What guesses may risk."""

from __future__ import annotations

import pytest

from duoserve.scheduling.account import ALLOWED_TIME, Account


def test_the_first_guess_waits_for_its_share_of_the_time() -> None:
    account = Account(most_open=9)
    account.settle(0.9 / ALLOWED_TIME, 0.0, copy_s=1.0)
    assert account.allows(1.0) == 0
    account.settle(0.2 / ALLOWED_TIME, 0.0, copy_s=1.0)
    assert account.allows(1.0) == 1


def test_what_was_saved_may_be_risked_and_what_was_lost_is_owed() -> None:
    account = Account(most_open=9)
    account.settle(0.0, 3.0, copy_s=1.0)
    assert account.allows(1.0) == 3
    account.settle(0.0, -5.0, copy_s=1.0)
    assert account.allows(1.0) == 0
    account.settle(0.0, 2.5, copy_s=1.0)
    assert account.allows(1.0) == 0


@pytest.mark.parametrize("copy_s", [0.5, 2.0])
def test_gains_are_not_put_by_for_ever(copy_s: float) -> None:
    account = Account(most_open=9)
    account.settle(0.0, 1e6, copy_s)
    assert account.allows(copy_s) == 9
