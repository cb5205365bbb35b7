"""The engine step by step: slices of a prefill between decode steps change no bit, and requests come and go."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve import SamplingParams
from duoserve.engine import Engine
from duoserve.errors import IntegrityError, OverloadedError, RequestError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.virtual import VirtualClock
from duoserve.interface import Objectives, ServiceSettings
from duoserve.request import Request
from duoserve.scheduling.policies import POLICIES
from tests.helpers.assembly import AssembledEngine, assembled
from tests.helpers.checkpoints import save_mixtral
from tests.scheduling.fortune import GUESSING, any_teller, generous_link
from tests.scheduling.recording import RecordingEngine

NUM_LAYERS = 4
RUNNING = [(7 * i) % 95 + 1 for i in range(9)]
PROMPT = [(11 * i * i + 5 * i) % 95 + 1 for i in range(30)]
OTHER = [(13 * i + 2) % 95 + 1 for i in range(5)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SLICES = st.lists(st.tuples(st.integers(1, NUM_LAYERS), st.integers(0, 2)), min_size=NUM_LAYERS, max_size=NUM_LAYERS)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("steps"), dtype=request.param, num_hidden_layers=NUM_LAYERS)


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(left, right, strict=True)
    )


class Interleaved:
    """A request that runs while the prompts of two others come in, in ``slices``: (layers, decode steps behind)."""

    def __init__(self, engine: AssembledEngine, slices: Sequence[tuple[int, int]]) -> None:
        self.engine, self.passes, self.cache = engine, engine.passes, engine.cache
        self.copies, self.guesses = engine.copies, set()
        self.decoded: list[Tensor] = []
        self.runner = self._request(0, RUNNING)
        first = self.passes.start_prefill([self.runner], interruptible=False)
        self._step(self.runner, self._last(first, NUM_LAYERS)[0])
        self.newcomers = [self._request(1, PROMPT), self._request(2, OTHER)]
        coming = self.passes.start_prefill(self.newcomers, interruptible=True)
        left = NUM_LAYERS
        for num_layers, steps in slices:
            if left > num_layers:
                assert self.passes.advance(coming, num_layers) is None
                left -= num_layers
                self._decode(steps)
        self.prefilled = self._last(coming, left)
        self._decode(6 - len(self.decoded) if len(self.decoded) < 6 else 0)
        for request in (self.runner, *self.newcomers):
            self.cache.release(request.kv)
        engine.check_integrity()

    def _request(self, number: int, prompt: list[int]) -> Request:
        request = Request(prompt, GREEDY, number=number)
        self.cache.reserve(request.kv, request.num_tokens)
        return request

    def _last(self, prefill: object, num_layers: int) -> Tensor:
        logits_BV = self.passes.advance(prefill, num_layers)
        assert logits_BV is not None
        return logits_BV

    def _decode(self, steps: int) -> None:
        for _ in range(steps):
            before = self.copies.guesses.copy()
            logits_V = self.passes.decode([self.runner])[0]
            self.guesses |= self.copies.guesses - before
            self.decoded.append(logits_V.clone())
            self._step(self.runner, logits_V)

    @staticmethod
    def _step(request: Request, logits_V: Tensor) -> None:
        request.output_ids.append(int(logits_V.argmax()))


@pytest.fixture(scope="module")
def truth(folder: Path) -> tuple[list[Tensor], Tensor]:
    with assembled(folder, "resident", 32, virtual_copies(0)) as engine:
        whole = Interleaved(engine, [])
        return whole.decoded, whole.prefilled


def virtual_copies(seed: int, piece_bytes: int | None = None):
    def copies(store: ExpertStore, pool: SlotPool) -> RecordingEngine:
        rng = random.Random(seed)
        return RecordingEngine(VirtualClock(), lambda nbytes: 1e-3, store, pool, rng, piece_bytes=piece_bytes)

    return copies


@pytest.mark.parametrize(("policy", "guesses"), [*product(POLICIES, [False]), *product(GUESSING, [True])])
def test_slicing_changes_no_bit(policy: str, guesses: bool, folder: Path, truth: tuple[list[Tensor], Tensor]) -> None:
    """Slots are poisoned, and copies complete in an order drawn by ``seed``."""
    resident, guessed_bytes = POLICIES[policy].all_resident, 0

    @given(
        slots=st.integers(3, 32),
        slices=SLICES,
        seed=st.integers(0, 2**31),
        piece_bytes=st.sampled_from([None, 1500]),
    )
    @settings(max_examples=2, deadline=None)
    def check(slots: int, slices: list[tuple[int, int]], seed: int, piece_bytes: int | None) -> None:
        nonlocal guessed_bytes
        teller = any_teller("anything", seed, 2) if guesses else None
        copies = virtual_copies(seed, piece_bytes)
        with assembled(folder, policy, 32 if resident else slots, copies, predictor=teller) as engine:
            sliced = Interleaved(engine, slices)
            assert same_bits(sliced.decoded[:6], truth[0][:6])
            assert same_bits([sliced.prefilled], [truth[1]])
            guessed_bytes += sum(ticket.sent for ticket in sliced.guesses)

    with generous_link():
        check()
    assert guessed_bytes > 0 or not guesses


def test_a_prefill_set_aside_leaves_the_decode_cache_and_its_speculation_alone(folder: Path) -> None:
    """Twelve slots, of which four are the ring: no decode step writes to those, none of its own are given up."""
    with assembled(folder, "lru", 12, virtual_copies(1)) as engine:
        scheduler, passes, cache = engine.scheduler, engine.passes, engine.cache
        table = scheduler.table
        runner, newcomer = Request(RUNNING, GREEDY, number=0), Request(PROMPT, GREEDY, number=1)
        for request in (runner, newcomer):
            cache.reserve(request.kv, request.num_tokens)
        passes.advance(passes.start_prefill([runner], interruptible=False), NUM_LAYERS)
        runner.output_ids.append(3)
        coming = passes.start_prefill([newcomer], interruptible=True)
        passes.advance(coming, 1)
        cached = {expert for slot, expert in table.ready() if slot not in scheduler._pass.space._slots}
        passes.decode([runner])
        lent = scheduler._cache.lent
        assert 0 < len(lent) <= 6
        assert len(cached - {expert for _, expert in table.ready()}) <= 8  # what its own misses have replaced
        speculated = {table.expert_in(slot) for slot in lent} - {None}
        assert any(expert is not None and expert.layer > 0 for expert in speculated)
        runner.output_ids.append(3)
        passes.decode([runner])
        assert speculated <= {table.expert_in(slot) for slot in lent}
        before = {expert for slot, expert in table.ready() if slot not in lent}
        assert passes.advance(coming, NUM_LAYERS - 1) is not None
        assert before <= {expert for _, expert in table.ready()}  # the rest of the prompt went through the ring alone
        for request in (runner, newcomer):
            cache.release(request.kv)
        engine.check_integrity()


def test_a_prefill_that_is_given_up_while_set_aside_replaces_nothing(folder: Path) -> None:
    """Where the device carries out decode steps by itself, its ring has no slots meanwhile."""
    with assembled(folder, "lru", 12, virtual_copies(1)) as engine:
        scheduler, passes, cache = engine.scheduler, engine.passes, engine.cache
        scheduler.read_through()
        table = scheduler.table
        runner, newcomer = Request(RUNNING, GREEDY, number=0), Request(PROMPT, GREEDY, number=1)
        for request in (runner, newcomer):
            cache.reserve(request.kv, request.num_tokens)
        passes.advance(passes.start_prefill([runner], interruptible=False), NUM_LAYERS)
        coming = passes.start_prefill([newcomer], interruptible=True)
        passes.advance(coming, 1)
        for token in (3, 5, 7):
            runner.output_ids.append(token)
            passes.decode([runner])
        before = set(table.ready())
        assert len(before) == 12
        passes.abandon(coming)
        assert set(table.ready()) == before
        for request in (runner, newcomer):
            cache.release(request.kv)
        engine.check_integrity()


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    while not engine.idle:
        for produced in engine.step():
            assert produced.error is None
        engine.check_integrity()
    return [request.output_ids for request in requests]


def asked(prompt: list[int], max_tokens: int = 6, **fields: object) -> Request:
    return Request(prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True), **fields)


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("float"), num_hidden_layers=NUM_LAYERS)


@pytest.mark.parametrize("scheduler", ["slo", "fcfs"])
def test_requests_join_and_leave_and_write_what_they_write_alone(float_folder: Path, scheduler: str) -> None:
    prompts = [PROMPT, OTHER, RUNNING, PROMPT[:3], OTHER[:1]]
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        alone = [[token for _, token in engine.generate([asked(prompt, 4 + i)])] for i, prompt in enumerate(prompts)]
        engine.serve_by(ServiceSettings(max_batch=3, scheduler=scheduler))
        requests = [asked(p, 4 + i, objectives=Objectives(1.0, 1e-4 * i or None)) for i, p in enumerate(prompts)]
        for request in requests[:2]:
            engine.add(request)
        for _ in range(3):
            engine.step()
        for request in requests[2:]:
            engine.add(request)
        assert engine.num_started <= 3 and engine.num_waiting >= 2
        assert run(engine, requests) == alone
        assert engine.kv_usage == 0


@pytest.mark.parametrize("scheduler", ["slo", "fcfs"])
def test_a_decode_step_lies_between_two_prefills_while_somebody_runs(float_folder: Path, scheduler: str) -> None:
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        engine.serve_by(ServiceSettings(max_batch=4, scheduler=scheduler))
        passes, course = engine.passes, []
        start, decode = passes.start_prefill, passes.decode
        passes.start_prefill = lambda *args, **how: course.append("P") or start(*args, **how)
        passes.decode = lambda requests: course.append("D") or decode(requests)
        for prompt in (RUNNING, PROMPT, OTHER):
            engine.add(asked(prompt, 20))
            while engine.num_waiting or passes.prefill:
                engine.step()
    assert course == ["P", "D", "P", "D", "P"]


def test_seeded_sampling_does_not_hear_the_neighbours(float_folder: Path) -> None:
    params = [SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, seed=seed, ignore_eos=True) for seed in range(4)]
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        alone = [[token for _, token in engine.generate([Request(PROMPT, one)])] for one in params]
        requests = [Request(PROMPT, one) for one in params]
        for request in requests:
            engine.add(request)
            engine.step()
        assert run(engine, requests) == alone


def test_aborted_requests_leave_nothing_behind(float_folder: Path) -> None:
    """One that waits, one in a prefill with another, one that runs, and a prefill of which nothing is left."""
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        alone = [token for _, token in engine.generate([asked(OTHER)])]
        engine.serve_by(ServiceSettings(max_batch=3))
        runs, one, two, waits = asked(RUNNING, 20), asked(PROMPT), asked(OTHER), asked(OTHER)
        engine.add(runs)
        while not runs.output_ids:
            engine.step()
        for request in (one, two, waits):
            engine.add(request)
        while engine.num_started == 1:
            engine.step()
        assert engine.num_started == 3 and engine.num_waiting == 1
        for request in (waits, one, runs):
            engine.abort(request)
            engine.abort(request)
            engine.check_integrity()
        assert run(engine, [two]) == [alone]
        assert (waits.finish_reason, one.finish_reason, runs.finish_reason) == ("abort",) * 3
        engine.add(one := asked(PROMPT))
        engine.step()
        assert engine.num_started == 1
        engine.abort(one)
        assert engine.idle and engine.kv_usage == 0
        engine.check_integrity()
        assert [token for _, token in engine.generate([asked(OTHER)])] == alone


def test_logprobs_are_of_the_logits_before_any_rule(float_folder: Path) -> None:
    params = SamplingParams(max_tokens=3, temperature=2.0, top_k=1, repetition_penalty=5.0, ignore_eos=True)
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        request = Request(PROMPT, params, num_logprobs=20)
        engine.add(request)
        given = [produced for _ in range(NUM_LAYERS + 3) for produced in engine.step()]
        assert len(given) == 3
        logits_TV = engine.forward(PROMPT + request.output_ids)
    for at, produced in enumerate(given):
        expected_V = logits_TV[len(PROMPT) - 1 + at].double().log_softmax(-1)
        said = produced.logprobs
        assert said is not None and said.token_id == produced.token and len(said.top) == 20
        assert said.logprob == pytest.approx(float(expected_V[said.token_id]), abs=1e-4)
        assert [token for token, _ in said.top] == expected_V.topk(20).indices.tolist()
        assert sum(torch.tensor([value for _, value in said.top]).exp()) <= 1.0


def test_what_cannot_be_served_is_refused(float_folder: Path) -> None:
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        engine.serve_by(ServiceSettings(max_batch=1, max_waiting=1, admission="strict"))
        for prompt in ([], [96], [1] * 256):
            with pytest.raises(RequestError):
                engine.add(asked(prompt))
        engine.add(asked(PROMPT))
        engine.add(asked(OTHER))
        with pytest.raises(OverloadedError, match="2 requests wait and 0 run") as refused:
            engine.add(asked(OTHER))
        assert refused.value.retry_after_s > 0
        elsewhere = pickle.loads(pickle.dumps(refused.value))  # as processes tell one another
        assert (str(elsewhere), elsewhere.retry_after_s) == (str(refused.value), refused.value.retry_after_s)
        run(engine, [])
        with pytest.raises(OverloadedError, match="would miss its objective: its first token is expected after"):
            engine.add(asked(PROMPT, objectives=Objectives(ttft_s=1e-9)))
        with pytest.raises(OverloadedError, match="a token takes"):
            engine.add(asked(PROMPT, objectives=Objectives(tpot_s=1e-9)))
        assert engine.idle
        engine.check_integrity()


def test_check_integrity_finds_a_page_that_outlives_its_request(float_folder: Path) -> None:
    with assembled(float_folder, "lru", 9, virtual_copies(2)) as engine:
        lost = asked(OTHER)
        engine.cache.reserve(lost.kv, 10)
        with pytest.raises(IntegrityError, match="pages"):
            engine.check_integrity()
        engine.cache.release(lost.kv)
        engine.scheduler.table.begin_load(ExpertId(0, 0), 8)
        engine.scheduler.table.finish_load(8)
        engine.scheduler.table.hold(8)
        with pytest.raises(IntegrityError, match="held"):
            engine.check_integrity()
