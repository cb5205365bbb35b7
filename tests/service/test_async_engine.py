"""AsyncEngine: many callers, one model, and what becomes of them when things go wrong."""

from __future__ import annotations

import asyncio
import math
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from duoserve import AsyncEngine, MoEModel, Objectives, Piece, ServiceSettings, ServiceState
from duoserve.errors import ClosedError, CopyError, DuoServeError, OverloadedError, RequestError
from duoserve.experts.copy_engine import ThreadedCopyEngine
from duoserve.experts.tickets import Ticket
from duoserve.models.transformer import Transformer
from duoserve.passes import Passes
from tests.helpers.checkpoints import BARD, save_mixtral
from tests.helpers.fakes import PATIENCE_S, Gate
from tests.helpers.live_threads import threads_since
from tests.helpers.loops import in_a_loop
from tests.helpers.toys import greedy, toy_prompt

PROMPT = toy_prompt(30)
LONG = greedy(200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


Open = Callable[..., MoEModel]


@pytest.fixture
def load(folder: Path, cache_dir: Path) -> Open:
    return lambda where=folder, **how: MoEModel.from_pretrained(
        where, **{"expert_slots": 9, "policy": "lru", "cache_dir": cache_dir, "max_context": 1024} | how
    )


@asynccontextmanager
async def serving(model: MoEModel, **how: Any) -> AsyncIterator[AsyncEngine]:
    """Whatever happened, nothing outlives its request."""
    service = AsyncEngine(model, settings=ServiceSettings(**how))
    engine = model._runtime.engine
    try:
        yield service
        if service.state is not ServiceState.DEAD:
            await until(lambda: service.figures().running + service.figures().waiting == 0)
            engine.check_integrity()
            assert engine.idle and service.figures().kv_usage == 0
    finally:
        await service.close()


async def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.002)


async def read(stream: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in stream]


def ids(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


@in_a_loop
async def test_streams_give_what_generate_gives(load: Open) -> None:
    with MoEModel.from_pretrained(BARD, policy="lru", expert_slots=12) as alone:
        whole = alone.generate("To be, or", greedy(24, ignore_eos=False, stop=["\n\n"]))

    async with serving(load(BARD, expert_slots=12)) as service:
        streams = [await service.submit("To be, or", greedy(24, ignore_eos=False, stop=["\n\n"])) for _ in range(3)]
        for stream in streams:
            pieces = await read(stream)
            assert "".join(piece.text for piece in pieces) == whole.text
            assert ids(pieces) == whole.token_ids
            assert pieces[-1].finish_reason == whole.finish_reason
            assert all(piece.finish_reason is None for piece in pieces[:-1])
            assert stream.output_tokens == len(whole.token_ids)
            times = stream.times
            assert times.arrived <= times.admitted <= times.first_token <= times.finished
        figures = service.figures()
        assert figures.finished == {whole.finish_reason: 3} and figures.state is ServiceState.READY
        await until(lambda: service.figures().stats.output_tokens == 3 * len(whole.token_ids))
        assert service.figures().stats.bytes.total > 0


@in_a_loop
async def test_a_stop_string_ends_the_stream_before_it(load: Open) -> None:
    async with serving(load(BARD, expert_slots=12)) as service:
        text = "".join(p.text for p in await read(await service.submit("To be, or", greedy(40))))
        for stop, most in ((text[12:16], 40), ("re", 4)):  # the last of 4 tokens completes it
            pieces = await read(await service.submit("To be, or", greedy(most, stop=stop)))
            assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
            assert pieces[-1].finish_reason == "stop"
        assert len(ids(pieces)) == 4


@in_a_loop
async def test_logprobs_come_with_the_tokens(load: Open) -> None:
    async with serving(load()) as service:
        pieces = await read(await service.submit(PROMPT, greedy(5), logprobs=3))
        said = [one for piece in pieces for one in piece.logprobs]
        assert [one.token_id for one in said] == ids(pieces) and all(len(one.top) == 3 for one in said)
        assert all(one.top[0] == (one.token_id, one.logprob) for one in said)  # greedy
        assert not any(piece.logprobs for piece in await read(await service.submit(PROMPT, greedy(2))))


@in_a_loop
async def test_what_cannot_be_served_is_refused_and_nothing_is_left_of_it(load: Open) -> None:
    async with serving(load(), max_batch=1, max_waiting=1) as service:
        for prompt, how, says in (
            ([], {}, "the prompt is empty"),
            ([96], {}, "token id 96 lies outside"),
            ("text", {}, "the prompt is text"),
            ([1] * 1024, {}, "exceed the 256 positions"),
            ([1], {"logprobs": 21}, "logprobs is 21, but must be an integer in 0..20"),
            ([1], {"arrived": math.inf}, "arrived is inf, but must be a number in 0.."),
        ):
            with pytest.raises(RequestError, match=says):
                await service.submit(prompt, greedy(), **how)
        first = await service.submit(PROMPT, LONG)
        await anext(first)
        second = await service.submit(PROMPT, LONG)
        with pytest.raises(OverloadedError) as refused:
            await service.submit(PROMPT, LONG)
        assert refused.value.retry_after_s > 0
        first.cancel(), second.cancel()
        await until(lambda: service.figures().finished.get("abort") == 2)
        assert service.figures().refused == 1


@in_a_loop
async def test_objectives_are_counted_and_strict_admission_refuses(load: Open) -> None:
    async with serving(load(), admission="strict", objectives=Objectives(ttft_s=60.0)) as service:
        long_ago = time.monotonic() - 30.0
        plain = await service.submit(PROMPT, greedy(), arrived=long_ago)
        assert plain.times.arrived == long_ago
        mixed = await service.submit(PROMPT, greedy(), Objectives(None, 60.0))
        assert (plain.objectives, mixed.objectives) == (Objectives(60.0), Objectives(60.0, 60.0))
        await read(plain), await read(mixed)
        with pytest.raises(OverloadedError, match="would miss its objective"):
            await service.submit(PROMPT, greedy(), Objectives(1e-9))
        figures = service.figures()
        assert (figures.attained, figures.with_objectives, figures.refused) == (2, 2, 1)
    async with serving(load()) as service:
        await read(await service.submit(PROMPT, greedy(), Objectives(1e-9)))
        assert (service.figures().attained, service.figures().with_objectives) == (0, 1)


def slowed(monkeypatch: pytest.MonkeyPatch, hold: Callable[[], object]) -> list[int]:
    """``hold`` is called before every layer; the list has the layers that began."""
    began, advance = [], Transformer.advance

    def slow(model: Transformer, partial: Any, num_layers: int) -> None:
        for _ in range(num_layers):
            began.append(partial.next_layer)
            hold()
            advance(model, partial, 1)

    monkeypatch.setattr(Transformer, "advance", slow)
    return began


@in_a_loop
async def test_a_cancelled_prompt_stops_between_two_layers(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Semaphore(3)
    # So slow that no step is planned to have two of them.
    began = slowed(monkeypatch, lambda: time.sleep(0.05) or go_on.acquire(timeout=PATIENCE_S))
    async with serving(load()) as service:
        before = await service.submit(PROMPT, greedy(1))
        await read(before)
        stream = await service.submit(PROMPT, LONG)
        await until(lambda: len(began) == 4)
        stream.cancel()
        stream.cancel()
        go_on.release(1000)
        assert await read(stream) == []
        await until(lambda: service.figures().running == 0)
        assert began == [0, 1, 2, 0] and service.figures().kv_usage == 0


@in_a_loop
async def test_a_task_that_is_cancelled_while_it_submits_leaves_nothing(
    load: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    slowed(monkeypatch, gate.pass_through)
    async with serving(load()) as service:
        first = await service.submit(PROMPT, greedy(2))
        await asyncio.to_thread(gate.wait_entered)
        waits = asyncio.create_task(service.submit(PROMPT, LONG))
        await until(lambda: len(service._worker._asked) == 1)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        gate.open()
        assert len(await read(first)) == 2
        await until(lambda: service.figures().finished == {"length": 1, "abort": 1})


@in_a_loop
async def test_a_copy_that_fails_ends_the_requests_of_its_pass_and_the_service_goes_on(
    load: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    expected = model.generate(PROMPT, LONG).token_ids
    wait, armed = ThreadedCopyEngine.wait, threading.Event()

    def failing(copies: ThreadedCopyEngine, tickets: Collection[Ticket]) -> Any:
        if armed.is_set():
            armed.clear()
            raise CopyError("injected")
        return wait(copies, tickets)

    monkeypatch.setattr(ThreadedCopyEngine, "wait", failing)
    async with serving(model) as service:
        streams = [await service.submit(PROMPT, LONG) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        armed.set()
        for stream in streams:
            with pytest.raises(CopyError, match="injected"):
                await read(stream)
        assert service.state is ServiceState.READY and service.figures().finished == {"error": 2}
        assert ids(await read(await service.submit(PROMPT, LONG))) == expected


@in_a_loop
async def test_logits_that_are_no_numbers_end_their_request_alone(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    expected = model.generate(PROMPT, LONG).token_ids
    decode, spoil = Passes.decode, [True]

    def spoiled(passes: Passes, requests: Any) -> torch.Tensor:
        logits_BV = decode(passes, requests)
        if spoil and len(requests) == 2:
            spoil.clear()
            logits_BV = logits_BV.clone()
            logits_BV[1, 5] = float("nan")
        return logits_BV

    monkeypatch.setattr(Passes, "decode", spoiled)
    async with serving(model) as service:
        good, bad = [await service.submit(PROMPT, LONG) for _ in range(2)]
        with pytest.raises(DuoServeError, match="non-finite logits"):
            await read(bad)
        assert ids(await read(good)) == expected
        assert service.figures().finished == {"error": 1, "length": 1} and service.state is ServiceState.READY


@in_a_loop
async def test_an_unexpected_error_ends_the_service_and_nobody_waits_for_ever(
    load: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    async with serving(model) as service:
        streams = [await service.submit(PROMPT, LONG) for _ in range(3)]
        await anext(streams[0])

        def broken(passes: Passes, requests: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(Passes, "decode", broken)
        for stream in streams:
            with pytest.raises(ClosedError, match="ZeroDivisionError: a bug"):
                await read(stream)
        assert service.state is ServiceState.DEAD and service.figures().state is ServiceState.DEAD
        with pytest.raises(ClosedError):
            await service.submit(PROMPT, LONG)
        await service.drain(1.0)


@in_a_loop
async def test_drain_lets_what_runs_finish_and_then_ends_the_rest(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(load()) as service:
        short = await service.submit(PROMPT, greedy(5))
        draining = asyncio.create_task(service.drain(20.0))
        await until(lambda: service.state is ServiceState.DRAINING)
        with pytest.raises(ClosedError):
            await service.submit(PROMPT, LONG)
        assert len(ids(await read(short))) == 5
        await asyncio.wait_for(draining, PATIENCE_S)  # half of what it may take
    model = load()
    slowed(monkeypatch, lambda: time.sleep(0.02))
    async with serving(model) as service:
        long = await service.submit(PROMPT, LONG)
        await anext(long)
        began = time.monotonic()
        await service.drain(0.1)
        assert time.monotonic() - began < 6.0  # the whole answer takes 12 s
        with pytest.raises(ClosedError, match="shutting down"):
            await read(long)


@in_a_loop
async def test_close_ends_everything_once_and_for_all(load: Open) -> None:
    threads = threads_since()
    model = load()
    service = AsyncEngine(model)
    with pytest.raises(RequestError, match="a service runs this model"):
        model.generate(PROMPT)
    with pytest.raises(RequestError, match="a service runs this model"):
        AsyncEngine(model)
    stream = await service.submit(PROMPT, LONG)
    await service.close()
    await service.close()
    with pytest.raises(ClosedError):
        await read(stream)
    with pytest.raises(ClosedError):
        await service.submit(PROMPT, LONG)
    for call in (lambda: model.stats, lambda: model.forward(PROMPT), lambda: AsyncEngine(model)):
        with pytest.raises(ClosedError, match="this model was closed"):
            call()
    await until(lambda: threads() <= 1)  # the loop's own pool may keep one


@in_a_loop
async def test_a_crowd_of_any_shape_gets_what_each_gets_alone(load: Open) -> None:
    """Some are cancelled, some malformed; the number is $DUOSERVE_CROWD. Nothing is left behind and nothing grows."""
    number, rng = int(os.environ.get("DUOSERVE_CROWD", "2000")), random.Random(7)
    kinds = [([rng.randrange(2, 96) for _ in range(rng.choice((1, 3, 9, 30)))], rng.randrange(1, 9)) for _ in range(60)]
    with load(expert_slots=24) as alone:
        expected = [alone.generate(prompt, greedy(most)).token_ids for prompt, most in kinds]

    async def one(service: AsyncEngine, free: asyncio.Semaphore) -> str:
        kind, fate = rng.randrange(len(kinds)), rng.random()
        prompt, most = kinds[kind]
        async with free:
            if fate < 0.01:
                with pytest.raises(RequestError):
                    await service.submit([], greedy())
                return "malformed"
            stream = await service.submit(prompt, greedy(most), Objectives(rng.choice((None, 0.01, 1.0))))
            if fate < 0.06:
                stop_at = rng.randrange(3)
                async for piece in stream:
                    stop_at -= len(piece.token_ids)
                    if stop_at < 0:
                        break
                stream.cancel()
                return "cancelled"
            assert ids(await read(stream)) == expected[kind]
            return "served"

    async with serving(load(expert_slots=24), max_batch=16) as service:
        free = asyncio.Semaphore(64)
        fates = await asyncio.gather(*(one(service, free) for _ in range(number)))
        assert {"served", "cancelled", "malformed"} == set(fates)
        await until(lambda: service.figures().running + service.figures().waiting == 0)
        figures = service.figures()
        assert figures.refused == 0 and figures.finished.get("error", 0) == 0
        assert sum(figures.finished.values()) == number - fates.count("malformed")
        assert not service._worker._tasks and not figures.stats.itl_s
