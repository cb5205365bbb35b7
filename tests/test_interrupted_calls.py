"""Ctrl-C anywhere in a call of the model: the next call, of whichever thread, finds it as it was."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import duoserve
from duoserve import MoEModel
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fakes import PATIENCE_S
from tests.helpers.interrupts import interrupted

FOLDER = Path(duoserve.__file__).parent
NAMES = (
    "moe_model",
    "turns",
    "engine",
    "context_limits",
    "roster",
    "passes",
    "metrics",
    "kv_cache",
    "scheduling/scheduler",
)
FILES = {str(FOLDER / f"{name}.py") for name in NAMES}
PROMPTS = [[5, 9, 2, 40, 41, 7], [3, 1], [8, 8, 60]]

Asked = Callable[[MoEModel], Any]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[MoEModel]:
    folder = save_mixtral(tmp_path / "model")
    with MoEModel.from_pretrained(folder, expert_slots=9, policy="lru", cache_dir=tmp_path, max_context=128) as model:
        yield model


def one(model: MoEModel) -> list[int]:
    return model.generate(PROMPTS[0], max_tokens=2, temperature=0.0, ignore_eos=True).token_ids


def several(model: MoEModel) -> list[list[int]]:
    """Two pages are in the cache, so that one of three prompts waits until another has ended."""
    return [done.token_ids for done in model.generate(PROMPTS, max_tokens=3, temperature=0.0, ignore_eos=True)]


def forward(model: MoEModel) -> list[float]:
    return model.forward(PROMPTS[0])[-1].tolist()


def here(frame: FrameType) -> bool:
    """In one of FILES, or in what it has called itself: a lock, a context manager."""
    caller = frame.f_back
    return frame.f_code.co_filename in FILES or (caller is not None and caller.f_code.co_filename in FILES)


def in_a_thread(ask: Asked, model: MoEModel) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask(model)), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the interrupted call still has its turn, or a lock"
    return found[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what ends a generator is let through
@pytest.mark.parametrize(("ask", "every"), [(one, 3), (several, 89), (forward, 3)])
def test_a_call_that_is_interrupted_anywhere_costs_the_next_one_nothing(
    ask: Asked, every: int, model: MoEModel
) -> None:
    """Of ``every`` so many calls one is interrupted."""
    expected = ask(model)
    at, reached = 1, True
    while reached:
        with interrupted(at, here) as interrupt:
            ask(model)
        reached = interrupt.seen >= at
        assert ask(model) == expected, at
        assert in_a_thread(ask, model) == expected, at
        model._runtime.engine.check_integrity()
        at += every


def test_a_stream_that_only_a_cycle_keeps_has_no_turn_any_more() -> None:
    """As Python leaves one that is interrupted between two of its instructions, from Python 3.12 on."""
    gc.disable()
    try:
        with MoEModel.from_pretrained("bard") as bard:
            stream = bard.stream("To be, or", max_tokens=40)
            next(stream)
            cycle: list[Any] = [stream]
            cycle.append(cycle)
            del stream, cycle
            assert bard.generate("To be, or", max_tokens=3).token_ids
    finally:
        gc.enable()
