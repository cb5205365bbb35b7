"""The compiler of the machine-code gate begins when it is known what is tested, and works beside the other tests."""

from __future__ import annotations

import pytest

from tests.kernels.machine_code import Compiler

COMPILER = pytest.StashKey[Compiler]()


def pytest_collection_finish(session: pytest.Session) -> None:
    gated = [item for item in session.items if "compiler" in getattr(item, "fixturenames", ())]
    if not gated or session.config.option.collectonly:
        return
    session.config.stash[COMPILER] = compiler = Compiler()
    for item in gated:
        if callspec := getattr(item, "callspec", None):
            compiler.order(callspec.params["name"], callspec.params["arch"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if COMPILER in session.config.stash:
        session.config.stash[COMPILER].close()


@pytest.fixture(scope="session")
def compiler(pytestconfig: pytest.Config) -> Compiler:
    return pytestconfig.stash[COMPILER]
