"""Coroutines that are called as functions are, tests among them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
MOST_S = 120.0  # what hangs fails then


def in_a_loop(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """``function`` in an event loop of its own; pytest still sees which fixtures it names."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return asyncio.run(asyncio.wait_for(function(*args, **kwargs), MOST_S))

    return run
