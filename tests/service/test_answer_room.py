"""Answers are lent the KV cache as they grow: more run at once, and who makes way goes on with the same bits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve import MoEModel, SamplingParams
from duoserve.batching.next_work import Batching
from duoserve.engine import Engine
from duoserve.errors import OverloadedError
from duoserve.interface import ServiceSettings
from duoserve.kv_cache import PAGE_TOKENS
from duoserve.passes import Passes
from duoserve.request import Request
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.loops import in_a_loop
from tests.helpers.toys import greedy
from tests.service.test_async_engine import ids, read, serving
from tests.test_engine_steps import OTHER, PROMPT, RUNNING, asked, run, virtual_copies


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("float"))


class Together:
    """How many requests have been decoded at once, by whichever engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        decode = Passes.decode

        def watched(passes: Passes, requests: Sequence[Request]) -> Tensor:
            self.most = max(self.most, len(requests))
            return decode(passes, requests)

        monkeypatch.setattr(Passes, "decode", watched)


def logprobs(engine: Engine, requests: Sequence[Request]) -> list[list[object]]:
    """Of every token of each request."""
    found: dict[Request, list[object]] = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while not engine.idle:
        for produced in engine.step():
            found[produced.request].append(produced.logprobs)
    return list(found.values())


@pytest.mark.parametrize("scheduler", ["slo", "fcfs"])
def test_answers_grow_together_and_make_way_when_no_room_is_left(
    float_folder: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four pages each may come to need three or four. Promised all of it, they would run one behind the other."""
    lengths = (150, 120, 200, 10)
    prompts = [PROMPT, OTHER, RUNNING, PROMPT[:3]]
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        alone = [[t for _, t in engine.generate([asked(p, n)])] for p, n in zip(prompts, lengths, strict=True)]
        engine.serve_by(ServiceSettings(answer_room=8, scheduler=scheduler))
        seen = Together(monkeypatch)
        requests = [asked(p, n) for p, n in zip(prompts, lengths, strict=True)]
        for request in requests:
            engine.add(request)
        assert run(engine, requests) == alone
        assert seen.most == 4 and engine.num_sent_back >= 2
        assert engine.kv_usage == 0 and [request.finish_reason for request in requests] == ["length"] * 4


def test_who_comes_back_has_the_bits_that_it_has_alone_where_batches_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_mixtral(tmp_path / "model", dtype=torch.bfloat16)
    how = {"expert_slots": 9, "policy": "lru", "cache_dir": tmp_path / "packs", "max_context": 256}
    with MoEModel.from_pretrained(folder, invariant=True, **how) as model:
        engine = model._runtime.engine
        alone = [logprobs(engine, [asked(prompt, 150, num_logprobs=5)]) for prompt in (PROMPT, OTHER)]
        engine.serve_by(ServiceSettings(answer_room=8))
        seen = Together(monkeypatch)
        together = logprobs(engine, [asked(prompt, 150, num_logprobs=5) for prompt in (PROMPT, OTHER)])
    assert engine.num_sent_back and seen.most == 2
    assert together == [one for single in alone for one in single]


def test_who_comes_back_is_penalized_for_what_it_had_written_and_draws_on(float_folder: Path) -> None:
    how = {"max_tokens": 200, "temperature": 0.7, "repetition_penalty": 1.5, "ignore_eos": True}
    drawn = [SamplingParams(seed=seed, **how) for seed in (1, 2)]
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        alone = [[token for _, token in engine.generate([Request(PROMPT, one)])] for one in drawn]
        engine.serve_by(ServiceSettings(answer_room=8))
        requests = [Request(PROMPT, one) for one in drawn]
        for request in requests:
            engine.add(request)
        assert run(engine, requests) == alone
        assert [request.sent_back is None for request in requests] == [True, False]


def test_one_that_was_sent_back_can_be_aborted_and_the_others_go_on(float_folder: Path) -> None:
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        alone = [token for _, token in engine.generate([asked(PROMPT, 200)])]
        engine.serve_by(ServiceSettings(answer_room=8))
        goes_on, sent = asked(PROMPT, 200), asked(OTHER, 200)
        for request in (goes_on, sent):
            engine.add(request)
        while not engine.num_sent_back:
            engine.step()
        assert sent.output_ids and engine.num_waiting == 1
        engine.abort(sent)
        engine.check_integrity()
        assert run(engine, [goes_on]) == [alone]
        assert engine.kv_usage == 0


def test_a_prompt_under_way_makes_way_for_those_that_run(float_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four pages one is the prompt's, when the answer needs the last."""
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        lengths = {"runs": (PROMPT * 2, 190), "comes": (OTHER * 10, 5)}
        alone = [[token for _, token in engine.generate([asked(*one)])] for one in lengths.values()]
        engine.serve_by(ServiceSettings(answer_room=8))
        runs, comes = (asked(*one) for one in lengths.values())
        engine.add(runs)
        while len(runs.output_ids) < 5:
            engine.step()
        engine.add(comes)
        monkeypatch.setattr(Batching, "layers", lambda self, load, decoded: 0 if runs.finish_reason is None else 1)
        assert run(engine, [runs, comes]) == alone
        assert runs.sent_back is None and engine.num_sent_back == 1
        engine.check_integrity()


def test_who_comes_leaves_a_page_to_each_that_runs_and_one_sent_back_asks_for_no_more_than_others(
    float_folder: Path,
) -> None:
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        engine.serve_by(ServiceSettings(answer_room=8))
        runs, comes = asked(PROMPT, 200), asked(OTHER * 20, 25)
        engine.add(runs)
        while len(runs.output_ids) < 5:
            engine.step()
        engine.add(comes)
        assert engine._traffic().free == 2 * PAGE_TOKENS and comes.room(8) == 108
        while len(runs.output_ids) < 150:
            engine.step()
        assert comes.output_ids and comes.sent_back is None and runs.room(8) == 30 + 150 + 8


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 150)), min_size=2, max_size=5),
    answer_room=st.sampled_from([1, 7, 64]),
    gaps=st.lists(st.integers(0, 30), min_size=5, max_size=5),
)
@settings(max_examples=6, deadline=None)
def test_whoever_comes_gets_all_that_was_asked_for(
    float_folder: Path, lengths: list[tuple[int, int]], answer_room: int, gaps: list[int]
) -> None:
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        engine.serve_by(ServiceSettings(answer_room=answer_room))
        requests = [asked((PROMPT * 2)[:prompt], answer) for prompt, answer in lengths]
        for request, gap in zip(requests, gaps, strict=False):
            engine.add(request)
            for _ in range(gap):
                engine.step()
        run(engine, requests)
        assert [len(request.output_ids) for request in requests] == [answer for _, answer in lengths]
        assert engine.kv_usage == 0


@in_a_loop
async def test_answers_that_might_fill_the_context_are_written_side_by_side(tmp_path: Path) -> None:
    """As of chats that name no max_tokens."""
    folder = save_mixtral(tmp_path / "model", max_position_embeddings=512)
    model = MoEModel.from_pretrained(folder, expert_slots=9, policy="lru", cache_dir=tmp_path, max_context=512)
    async with serving(model, answer_room=32) as service:
        streams = [await service.submit(PROMPT, greedy(512 - len(PROMPT))) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        assert service.figures().running == 2
        whole = await asyncio.gather(*map(read, streams))
        assert [stream.output_tokens for stream in streams] == [512 - len(PROMPT)] * 2
        assert ids(whole[0])[-300:] == ids(whole[1])[-300:]


def test_nobody_waits_where_there_is_a_place(float_folder: Path) -> None:
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        engine.serve_by(ServiceSettings(max_batch=2, max_waiting=0))
        for _ in range(2):
            engine.add(asked(PROMPT, 5))
        with pytest.raises(OverloadedError, match="2 requests wait and 0 run: max_batch=2 and max_waiting=0"):
            engine.add(asked(PROMPT, 5))
        engine.step(), engine.step()
        with pytest.raises(OverloadedError, match="0 requests wait and 2 run"):
            engine.add(asked(PROMPT, 5))
