"""The service's thread when what nobody foresaw happens: all who wait are told, and it is written down."""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from duoserve import AsyncEngine, MoEModel, Objectives, ServiceState
from duoserve.errors import ClosedError, CopyError, DuoServeError, RequestError
from duoserve.models.transformer import Transformer
from duoserve.passes import Passes
from duoserve.request import Request
from duoserve.sampling import Sampler
from duoserve.service.stream import Stream
from duoserve.text.tokenizer import IncrementalDecoder
from tests.helpers.checkpoints import BARD, save_mixtral
from tests.helpers.fakes import Gate
from tests.helpers.loops import in_a_loop
from tests.helpers.small_tokenizers import byte_level_tokenizer, stripping_tokenizer
from tests.helpers.toys import greedy
from tests.service.test_async_engine import serving

PROMPT = [5, 9, 2, 40, 41, 7]
PARAMS = greedy(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("worker"))


def broken(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any) -> None:
        raise error

    return fail


def test_a_service_that_cannot_be_made_does_not_keep_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MoEModel.from_pretrained(folder) as model:
        with monkeypatch.context() as patch:
            patch.setattr(model._runtime.engine, "serve_by", broken(MemoryError("no room for batches")))
            with pytest.raises(MemoryError):
                AsyncEngine(model)
        assert len(model.generate(PROMPT, PARAMS).token_ids) == PARAMS.max_tokens


@in_a_loop
async def test_a_close_that_is_cancelled_comes_to_its_end(folder: Path) -> None:
    """It waits for a step that is under way; who calls it again waits for the same end."""
    gate = Gate()
    service = AsyncEngine(MoEModel.from_pretrained(folder))
    engine = service.model._runtime.engine
    step, engine.step = engine.step, lambda: gate.pass_through() or step()
    stream = await service.submit(PROMPT, PARAMS)
    await asyncio.to_thread(gate.wait_entered)
    first = asyncio.create_task(service.close())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.open()
    await service.close()
    with pytest.raises(ClosedError, match="this model was closed"):
        _ = service.model.config
    with pytest.raises(ClosedError):
        [_ async for _ in stream]


def test_a_service_is_closed_in_another_event_loop_than_one_that_gave_up(folder: Path) -> None:
    gate, streams = Gate(), []

    async def begun() -> AsyncEngine:
        service = AsyncEngine(MoEModel.from_pretrained(folder))
        engine = service.model._runtime.engine
        step, engine.step = engine.step, lambda: gate.pass_through() or step()
        streams.append(await service.submit(PROMPT, PARAMS))
        await asyncio.to_thread(gate.wait_entered)
        return service

    loop = asyncio.new_event_loop()
    service = loop.run_until_complete(begun())
    with pytest.raises(TimeoutError):
        loop.run_until_complete(asyncio.wait_for(service.close(), 0.05))
    loop.close()
    gate.open()
    for _ in range(2):
        asyncio.run(asyncio.wait_for(service.close(), 20))
    with pytest.raises(ClosedError, match="this model was closed"):
        _ = service.model.config


NEVER_CLOSED = """
import asyncio
from duoserve import AsyncEngine, MoEModel, SamplingParams

async def main():
    service = AsyncEngine(MoEModel.from_pretrained("bard", policy="lru", expert_slots=12))
    stream = await service.submit("To be", SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True))
    await anext(stream)
    return service, stream

kept = asyncio.run(main())
print("left")
"""


def test_a_program_that_closes_no_service_ends_in_order(tmp_path: Path) -> None:
    """An interpreter that ends kills its other threads; inside torch that would abort the process."""
    environment = os.environ | {"DUOSERVE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", NEVER_CLOSED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "left\n", "")


@pytest.mark.parametrize("dies", [False, True])
@in_a_loop
async def test_a_service_that_has_ended_is_not_kept_until_the_program_ends(
    dies: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", kept.append)
    monkeypatch.setattr(atexit, "unregister", kept.remove)
    service = AsyncEngine(MoEModel.from_pretrained(folder))
    assert kept == [service._worker.stop]
    if dies:
        monkeypatch.setattr(Transformer, "advance", broken(ZeroDivisionError("a bug")))
        with pytest.raises(ClosedError, match="a bug"):
            await anext(await service.submit(PROMPT, PARAMS))
        service._worker._thread.join()
    else:
        await service.close()
    assert kept == []
    await service.close()


@pytest.mark.parametrize("error", [None, CopyError("no such expert"), ZeroDivisionError("a bug")], ids=repr)
@in_a_loop
async def test_who_keeps_a_closed_service_and_what_it_has_said_keeps_nothing_of_the_model(
    error: Exception | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error is not None:
        monkeypatch.setattr(Transformer, "advance", broken(error))
    service = AsyncEngine(MoEModel.from_pretrained(folder))
    engine = weakref.ref(service.model._runtime.engine)
    with pytest.raises(RequestError) as refused:
        await service.submit([], PARAMS)
    stream = await service.submit(PROMPT, PARAMS)
    while stream.times.finished is None:
        await asyncio.sleep(0.01)
    await service.close()
    gc.collect()
    assert engine() is None and refused.value is not None
    assert service.figures().finished == {"length" if error is None else "error": 1}
    stream.cancel()
    with pytest.raises(ClosedError):
        await service.submit(PROMPT, PARAMS)
    await service.close()


@in_a_loop
async def test_an_error_while_requests_are_added_reaches_all_who_wait(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MoEModel.from_pretrained(folder)
    async with serving(model) as service:
        monkeypatch.setattr(model._runtime.engine, "add", broken(ZeroDivisionError("a bug")))
        asked = [service.submit(PROMPT, PARAMS) for _ in range(4)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [ClosedError] * 4
        assert service.state is ServiceState.DEAD
    [record] = [one for one in caplog.records if one.levelno == logging.CRITICAL]
    assert record.exc_info is not None and isinstance(record.exc_info[1], ZeroDivisionError)


@in_a_loop
async def test_no_kind_of_error_leaves_callers_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MoEModel.from_pretrained(folder)
    async with serving(model) as service:
        monkeypatch.setattr(model._runtime.engine, "step", broken(SystemExit(3)))
        stream = await service.submit(PROMPT, PARAMS)
        with pytest.raises(ClosedError, match="SystemExit: 3"):
            async for _ in stream:
                pass
        assert service.state is ServiceState.DEAD


@in_a_loop
async def test_who_has_been_told_of_an_error_goes_on_while_others_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each is told is cleared of the calls that it came through: of its own, not of another caller's."""
    give, decode = Stream.give, Passes.decode

    def slow(stream: Stream, item: Any, finished: float | None) -> bool:
        time.sleep(0.05)  # who was told before is long back to waiting
        return give(stream, item, finished)

    def failing(passes: Passes, requests: Sequence[Request]) -> Tensor:
        if len(requests) == 3:
            raise CopyError("injected")
        return decode(passes, requests)

    async with serving(MoEModel.from_pretrained(folder)) as service:
        monkeypatch.setattr(Stream, "give", slow)
        monkeypatch.setattr(Passes, "decode", failing)
        streams = [await service.submit(PROMPT, replace(PARAMS, max_tokens=50)) for _ in range(3)]  # a page each
        told = []
        for stream in streams:
            with pytest.raises(CopyError, match="injected") as caught:
                async for _ in stream:
                    pass
            told.append(caught.value)
        assert len({*map(id, told)}) == 3


@pytest.mark.parametrize("error", [CopyError("no such expert"), ZeroDivisionError("a bug")], ids=repr)
@in_a_loop
async def test_who_has_raised_the_cause_of_an_error_goes_on_while_others_are_told(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give, gone_on = Stream.give, []

    def slow(stream: Stream, item: Any, finished: float | None) -> bool:
        time.sleep(0.05)
        return give(stream, item, finished)

    async def reader(stream: Stream) -> None:
        with pytest.raises(DuoServeError) as caught:
            async for _ in stream:
                pass
        with pytest.raises(type(caught.value.__cause__)):  # which is everybody's, and has come through this call now
            raise caught.value.__cause__ or error
        await asyncio.sleep(0.2)
        gone_on.append(stream)

    error.__cause__ = OSError("io")
    async with serving(MoEModel.from_pretrained(folder)) as service:
        streams = [await service.submit(PROMPT, PARAMS) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        monkeypatch.setattr(Stream, "give", slow)
        monkeypatch.setattr(Passes, "decode", broken(error))
        await asyncio.gather(*map(reader, streams))
        assert {*gone_on} == {*streams}


@pytest.mark.parametrize(("kind", "name"), [(Sampler, "__call__"), (IncrementalDecoder, "push")])
@in_a_loop
async def test_who_keeps_what_a_single_request_was_told_keeps_nothing_of_the_model(
    kind: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, broken(DuoServeError("of this request alone")))
    service = AsyncEngine(MoEModel.from_pretrained(BARD, policy="lru", expert_slots=12))
    engine = weakref.ref(service.model._runtime.engine)
    stream = await service.submit("O Romeo", PARAMS)
    while stream.times.finished is None:
        await asyncio.sleep(0.01)
    await service.close()
    gc.collect()
    assert engine() is None and service.figures().finished == {"error": 1}
    with pytest.raises(DuoServeError, match="of this request alone"):
        await anext(stream)


@in_a_loop
async def test_a_tokenizer_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    push, fails = IncrementalDecoder.push, [True]

    def stumbling(self: IncrementalDecoder, token_id: int) -> str:
        if fails and fails.pop():
            raise RequestError("the tokenizer panicked")
        return push(self, token_id)

    model = MoEModel.from_pretrained(BARD, policy="lru", expert_slots=12)
    async with serving(model) as service:
        monkeypatch.setattr(IncrementalDecoder, "push", stumbling)
        first, second = [await service.submit("O Romeo", PARAMS) for _ in range(2)]
        with pytest.raises(DuoServeError, match="panicked") as raised:
            async for _ in first:
                pass
        assert all(entry.path.name != "worker.py" for entry in raised.traceback)  # whose frames have the engine
        assert sum([len(piece.token_ids) async for piece in second]) == PARAMS.max_tokens
        assert service.state is ServiceState.READY and service.figures().finished == {"error": 1, "length": 1}
        model._runtime.engine.check_integrity()


@in_a_loop
async def test_a_decoder_that_panics_ends_its_request_alone(folder: Path, tmp_path: Path) -> None:
    with MoEModel.from_pretrained(folder) as model:
        free = model.generate(PROMPT, PARAMS).token_ids
    last = max(set(free), key=free.index)
    folder = shutil.copytree(folder, tmp_path / "model")
    stripping_tokenizer(last, 96).save(str(folder / "tokenizer.json"))
    async with serving(MoEModel.from_pretrained(folder)) as service:
        first, second = [await service.submit(PROMPT, replace(PARAMS, max_tokens=n)) for n in (30, free.index(last))]
        with pytest.raises(DuoServeError, match="the tokenizer cannot decode"):
            async for _ in first:
                pass
        text = "".join([piece.text async for piece in second])
        assert text == "".join(f"w{token}" for token in free[: free.index(last)])
        assert service.state is ServiceState.READY and service.figures().finished == {"error": 1, "length": 1}


@in_a_loop
async def test_the_last_piece_has_the_end_token_without_its_text(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    with MoEModel.from_pretrained(folder) as model:
        free = model.generate(PROMPT, PARAMS).token_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": free[3]}))

    async with serving(MoEModel.from_pretrained(folder)) as service:
        stream = await service.submit(PROMPT, replace(PARAMS, ignore_eos=False), logprobs=1)
        pieces = [piece async for piece in stream]
        assert [token for piece in pieces for token in piece.token_ids] == free[:4] and len(pieces[-1].logprobs) == 1
        assert service.model.tokenizer is not None
        assert "".join(piece.text for piece in pieces) == service.model.tokenizer.decode(free[:3])


@in_a_loop
async def test_figures_know_a_request_no_later_than_its_caller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give, seen = Stream.give, []
    model = MoEModel.from_pretrained(folder)
    engine, gate = model._runtime.engine, threading.Event()
    step = engine.step

    def looking(stream: Stream, item: Any, finished: float | None) -> bool:
        seen.append(service.figures().running)
        return give(stream, item, finished)

    async with serving(model) as service:
        monkeypatch.setattr(Stream, "give", looking)
        monkeypatch.setattr(engine, "step", lambda: [*step()] if gate.wait(10) else [])
        stream = await service.submit(PROMPT, PARAMS)
        assert service.figures().waiting == 1
        gate.set()
        assert sum([len(piece.token_ids) async for piece in stream]) == PARAMS.max_tokens
        assert seen == [1] * (PARAMS.max_tokens - 1) + [0]


@pytest.mark.parametrize(
    ("hoped", "message"),
    [
        (lambda: (PARAMS, Objectives("1")), "ttft_s is '1', but must be a finite number"),
        (lambda: (PARAMS, 1.0), "objectives is 1.0, but must be Objectives"),
        (lambda: ({"max_tokens": 3}, None), "params is {'max_tokens': 3}, but must be SamplingParams"),
    ],
    ids=["no number", "no objectives", "no params"],
)
@in_a_loop
async def test_who_asks_for_what_is_none_is_refused_alone(hoped: Callable[[], Any], message: str, folder: Path) -> None:
    async with serving(MoEModel.from_pretrained(folder)) as service:
        other = await service.submit(PROMPT, PARAMS)
        await anext(other)
        with pytest.raises(RequestError, match=message):
            await service.submit(PROMPT, *hoped())
        assert sum([len(piece.token_ids) async for piece in other]) == PARAMS.max_tokens - 1
        assert service.state is ServiceState.READY
