"""close() while other threads use the model: nothing is released under a step, and a step is all it waits for."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from duoserve import AsyncEngine, ClosedError, MoEModel, ServiceState
from duoserve.passes import Passes
from tests.helpers.fakes import PATIENCE_S, Gate
from tests.helpers.live_threads import threads_since
from tests.helpers.loops import in_a_loop
from tests.helpers.toys import greedy

GREEDY = greedy(40)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=tmp_path) as model:
        yield model


class Call:
    """What ``call`` does in a thread of its own, which has begun."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def error(self) -> BaseException | None:
        """What it raised, once it is over."""
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        return self._error


@pytest.mark.parametrize("what", ["generate", "forward"])
def test_nothing_is_released_under_a_step(what: str, model: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, released = Gate(), threading.Event()
    name = "decode" if what == "generate" else "whole"
    step = getattr(Passes, name)

    def held_up(*args: object) -> Tensor:
        gate.pass_through()
        assert not released.is_set()
        return step(*args)

    monkeypatch.setattr(Passes, name, held_up)
    model._runtime._resources.callback(released.set)  # the first thing that is released
    call = Call(lambda: model.generate("To be", GREEDY) if what == "generate" else model.forward([1, 2, 3]))
    gate.wait_entered()
    waiting, closing = Call(lambda: model.generate("To be", GREEDY)), Call(model.close)
    assert not released.wait(0.2), "the model was closed under a step"
    gate.open()
    assert closing.error() is None and released.is_set()
    assert isinstance(waiting.error(), ClosedError)
    assert isinstance(call.error(), ClosedError if what == "generate" else type(None))


@in_a_loop
async def test_nothing_is_released_under_the_step_of_a_service(
    model: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, released, decode = Gate(), threading.Event(), Passes.decode
    tokens: list[int] = []

    def held_up(*args: object) -> Tensor:
        gate.pass_through()
        assert not released.is_set()
        return decode(*args)

    alone = model.generate("To be", GREEDY).token_ids
    monkeypatch.setattr(Passes, "decode", held_up)
    model._runtime._resources.callback(released.set)
    service = AsyncEngine(model)
    engine = weakref.ref(model._runtime.engine)
    stream = await service.submit("To be", GREEDY)
    await asyncio.to_thread(gate.wait_entered)
    closing = Call(model.close)
    assert not await asyncio.to_thread(released.wait, 0.2), "the model was closed under a step"
    gate.open()
    with pytest.raises(ClosedError, match="shutting down"):
        async for piece in stream:
            tokens.extend(piece.token_ids)
    assert await asyncio.to_thread(closing.error) is None and released.is_set()
    gc.collect()
    assert engine() is None and service.state is ServiceState.DRAINING
    with pytest.raises(ClosedError):
        await service.submit("To be", GREEDY)
    await service.close()
    assert tokens == alone[: len(tokens)] and 0 < len(tokens) < len(alone)


def test_nothing_is_released_while_a_service_is_made(model: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, released, prepare = Gate(), threading.Event(), Passes.prepare

    def held_up(*args: object) -> None:
        gate.pass_through()
        assert not released.is_set()
        prepare(*args)

    monkeypatch.setattr(Passes, "prepare", held_up)
    model._runtime._resources.callback(released.set)
    services: list[AsyncEngine] = []
    making = Call(lambda: services.append(AsyncEngine(model)))
    gate.wait_entered()
    closing = Call(model.close)
    assert not released.wait(0.2), "the model was closed while a service was made of it"
    gate.open()
    assert making.error() is None and closing.error() is None
    assert released.is_set() and services[0].state is ServiceState.DRAINING


def test_a_stream_that_nobody_reads_holds_up_no_close(model: MoEModel) -> None:
    stream = model.stream("To be", GREEDY)
    assert Call(lambda: next(stream)).error() is None
    assert Call(model.close).error() is None
    with pytest.raises(ClosedError, match="was closed"):
        next(stream)


@pytest.mark.parametrize(
    "ask",
    [lambda model: model.generate("To be", GREEDY), lambda model: model.forward([1, 2, 3]), AsyncEngine],
    ids=["generate", "forward", "a service"],
)
def test_who_waits_for_a_stream_that_nobody_reads_hears_of_the_close(
    ask: Callable[[MoEModel], object], model: MoEModel
) -> None:
    stream = model.stream("To be", GREEDY)
    next(stream)
    waiting = [Call(lambda: ask(model)) for _ in range(2)]
    waiting[0].thread.join(0.2)
    assert all(call.thread.is_alive() for call in waiting)
    model.close()
    assert [type(call.error()) for call in waiting] == [ClosedError] * 2


def test_a_thread_may_close_the_model_under_its_own_stream(model: MoEModel) -> None:
    stream = model.stream("To be", GREEDY)
    next(stream)
    model.close()
    with pytest.raises(ClosedError, match="was closed"):
        next(stream)


def test_a_stream_that_is_kept_keeps_nothing_of_a_closed_model(model: MoEModel) -> None:
    engine = weakref.ref(model._runtime.engine)
    stream = model.stream("To be", GREEDY)
    next(stream)
    model.close()
    gc.collect()
    assert engine() is None
    with pytest.raises(ClosedError, match="was closed"):
        next(stream)


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_a_model_held_that_nobody_has_any_more_is_released(tmp_path: Path) -> None:
    files, threads = open_files(), threads_since()
    model = MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=tmp_path)
    model.generate("To be", GREEDY)
    assert threads() > 0 and open_files() > files
    del model
    gc.collect()
    wait_until(lambda: threads() == 0 and open_files() <= files)


def test_a_stream_keeps_its_model(tmp_path: Path) -> None:
    threads = threads_since()
    pieces = MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=tmp_path).stream("To be", GREEDY)
    next(pieces)
    gc.collect()
    assert "".join(pieces)
    del pieces
    gc.collect()
    wait_until(lambda: threads() == 0)
