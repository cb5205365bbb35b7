"""How Hypothesis goes about what fails, by the profiles of ``conftest.py``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def test_what_fails_on_a_gpu_is_said_at_once_and_can_be_run_again() -> None:
    """Smaller examples would take minutes there, as each shape compiles kernels of its own."""
    failed: list[int] = []

    @settings.get_profile("gpu")
    @given(st.integers())
    def fails(number: int) -> None:
        if number > 1000:
            failed.append(number)
            raise AssertionError("too large")

    with pytest.raises(AssertionError, match="too large") as raised:
        fails()
    assert len(failed) == 2 and failed[0] == failed[1] > 1001  # the second time for its report
    assert "@reproduce_failure(" in "\n".join(raised.value.__notes__)
