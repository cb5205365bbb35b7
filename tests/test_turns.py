"""Whose turn it is when a stream passes from one thread to another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from duoserve import MoEModel, RequestError
from tests.helpers.fakes import PATIENCE_S
from tests.helpers.toys import greedy

LONG, SHORT = greedy(40), greedy(2)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=tmp_path) as model:
        yield model


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    """One other thread."""
    with ThreadPoolExecutor(1) as thread:
        yield thread


def test_who_reads_another_threads_stream_is_told_that_it_is_open(
    model: MoEModel, elsewhere: ThreadPoolExecutor
) -> None:
    stream = model.stream("To be", LONG)
    next(stream)
    elsewhere.submit(next, stream).result(PATIENCE_S)
    call = elsewhere.submit(model.generate, "To be", SHORT)
    try:
        with pytest.raises(RequestError, match="this thread's earlier stream is still open"):
            call.result(PATIENCE_S)
    finally:
        stream.close()
    assert model.generate("To be", SHORT).token_ids


def test_who_has_given_a_stream_away_waits_for_its_end(model: MoEModel, elsewhere: ThreadPoolExecutor) -> None:
    alone = model.generate("To be", LONG)
    stream = model.stream("To be", LONG)
    said = [next(stream), elsewhere.submit(next, stream).result(PATIENCE_S)]
    rest = elsewhere.submit(list, stream)
    assert model.generate("To be", SHORT).token_ids == alone.token_ids[:2]
    assert rest.done() and "".join(said + rest.result()) == alone.text
