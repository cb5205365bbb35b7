"""Streams that their readers leave: what nobody can read any more is not computed."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest

from duoserve import MoEModel
from duoserve.service.stream import Stream
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.loops import in_a_loop
from tests.helpers.toys import greedy
from tests.service.test_async_engine import serving, slowed, until

PROMPT = [5, 9, 2, 40, 41, 7]
LONG = greedy(200)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MoEModel:
    """One that takes its time."""
    slowed(monkeypatch, lambda: time.sleep(0.005))
    return MoEModel.from_pretrained(save_mixtral(tmp_path))


@in_a_loop
async def test_a_stream_that_is_dropped_ends_its_request(model: MoEModel) -> None:
    async with serving(model) as service:
        async for _ in await service.submit(PROMPT, LONG):
            break
        await until(lambda: service.figures().finished == {"abort": 1})
        assert service.figures().stats.output_tokens < LONG.max_tokens // 2


@in_a_loop
async def test_a_stream_that_is_dropped_before_its_start_never_starts(model: MoEModel) -> None:
    async with serving(model, max_batch=1) as service:
        first = await service.submit(PROMPT, LONG)
        await anext(first)
        await service.submit(PROMPT, LONG)
        await until(lambda: service.figures().finished == {"abort": 1})
        assert (service.figures().running, service.figures().waiting) == (1, 0)
        first.cancel()


@in_a_loop
async def test_a_reader_that_is_cancelled_takes_its_request_with_it(model: MoEModel) -> None:
    async def reader() -> None:
        async for _ in await service.submit(PROMPT, LONG):
            reads.set()

    reads = asyncio.Event()
    async with serving(model) as service:
        reading = asyncio.create_task(reader())
        await reads.wait()
        reading.cancel()
        await asyncio.wait({reading})
        del reading
        gc.collect()
        await until(lambda: service.figures().finished == {"abort": 1})
        assert service.figures().stats.output_tokens < LONG.max_tokens // 2


@in_a_loop
async def test_a_stream_that_is_kept_goes_on_when_its_reader_comes_back(model: MoEModel) -> None:
    async def some(stream: Stream) -> int:
        async for _ in stream:
            break
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.001)
        return 1

    async with serving(model) as service:
        stream = await service.submit(PROMPT, greedy(20))
        read = await some(stream)
        gc.collect()
        assert read + sum([len(piece.token_ids) async for piece in stream]) == 20
