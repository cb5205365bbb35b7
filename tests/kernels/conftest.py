"""The compiler of the machine-code gate begins when it is known what is tested, and works beside the other tests."""

from __future__ import annotations

import os

import pytest

from tests.kernels.machine_code import Compiler

COMPILER = pytest.StashKey[Compiler]()


def pytest_collection_finish(session: pytest.Session) -> None:
    # Of several processes, each collects all tests, and one is given this file's: it begins with the first of them.
    if "PYTEST_XDIST_WORKER" not in os.environ and not session.config.option.collectonly:
        begin(session)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if COMPILER in session.config.stash:
        session.config.stash[COMPILER].close()


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest) -> Compiler:
    if COMPILER not in request.config.stash:
        begin(request.session)
    return request.config.stash[COMPILER]


def begin(session: pytest.Session) -> None:
    """Orders all that the gate's tests will ask for, in their order."""
    if gated := [item for item in session.items if "compiler" in getattr(item, "fixturenames", ())]:
        session.config.stash[COMPILER] = compiler = Compiler()
        for item in gated:
            if callspec := getattr(item, "callspec", None):
                compiler.order(callspec.params["name"], callspec.params["arch"])
