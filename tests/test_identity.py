"""The promise: bitwise the output of the all-resident run, whatever the policy, slots, tier and order of arrival."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve import MoEModel
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore, HostStore, TieredStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.virtual import VirtualClock, VirtualCopyEngine
from duoserve.request import Request
from tests.helpers.assembly import assembled, tokens_of
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fake_streams import FakeStreams
from tests.helpers.toys import greedy, toy_prompt
from tests.scheduling.fortune import GUESSING, STREAMING, any_teller, generous_link
from tests.scheduling.recording import RecordingEngine

PROMPT = toy_prompt(30)
GREEDY = greedy(12)
SHARES = {"top_k + 1": 3, "a quarter": 6, "half": 12, "all": 24}


@dataclass(eq=False)
class Outcome:
    logits_TV: Tensor
    tokens: list[int]
    batch_tokens: list[list[int]]

    def same_bits(self, other: Outcome) -> bool:
        same_logits = torch.equal(self.logits_TV.view(torch.int32), other.logits_TV.view(torch.int32))
        return same_logits and self.tokens == other.tokens and self.batch_tokens == other.batch_tokens


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("identity"), dtype=request.param)


@pytest.fixture(scope="module")
def truth(folder: Path) -> Outcome:
    with MoEModel.from_pretrained(folder, policy="resident") as model:
        return outcome(model)


def outcome(model: MoEModel) -> Outcome:
    prompts = [PROMPT[:7], PROMPT, PROMPT[3:4]]
    first = model.generate(PROMPT, GREEDY).token_ids
    batch = [done.token_ids for done in model.generate(prompts, GREEDY)]
    return Outcome(model.forward(PROMPT + first), first, batch)


@pytest.mark.parametrize("host_memory", ["auto", "1GiB", "20KiB"], ids=["disk", "ram", "ram_and_disk"])
@pytest.mark.parametrize("slots", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("policy", STREAMING)
def test_real_copies(policy: str, slots: int, host_memory: str, folder: Path, truth: Outcome, tmp_path: Path) -> None:
    with MoEModel.from_pretrained(
        folder, policy=policy, expert_slots=slots, host_memory=host_memory, cache_dir=tmp_path
    ) as model:
        assert model.policy == policy and model.memory.num_slots == slots
        assert outcome(model).same_bits(truth)
        assert model.stats.bytes.total > 0 or slots == 24


@pytest.mark.parametrize("slots", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("policy", GUESSING)
@pytest.mark.parametrize("kind", ["liar", "anything"])
def test_predictors_change_nothing(
    kind: str, policy: str, slots: int, folder: Path, truth: Outcome, tmp_path: Path
) -> None:
    teller = any_teller(kind, slots, horizon=2)
    with MoEModel.from_pretrained(
        folder, policy=policy, expert_slots=slots, predictor=teller, cache_dir=tmp_path
    ) as model:
        assert outcome(model).same_bits(truth)
    assert teller.heard.count(-1) == 2 * 12 + 1  # every pass of a request, of a batch and of the prompt alone


@pytest.mark.parametrize("policy", GUESSING)
def test_predictors_change_nothing_in_any_order_of_arrival(policy: str, folder: Path, truth: Outcome) -> None:
    guessed_bytes = 0

    @given(
        slots=st.integers(3, 24),
        seed=st.integers(0, 2**31),
        kind=st.sampled_from(["liar", "anything"]),
        horizon=st.integers(1, 3),
    )
    @settings(max_examples=10, deadline=None)
    def check(slots: int, seed: int, kind: str, horizon: int) -> None:
        nonlocal guessed_bytes
        made: list[RecordingEngine] = []

        def virtual(store: ExpertStore, pool: SlotPool) -> RecordingEngine:
            made.append(RecordingEngine(VirtualClock(), lambda nbytes: 1e-3, store, pool, random.Random(seed)))
            return made[0]

        with assembled(folder, policy, slots, virtual, predictor=any_teller(kind, seed, horizon)) as engine:
            tokens = (token for _, token in engine.generate([Request(PROMPT, GREEDY)]))
            assert next(tokens) == truth.tokens[0]
            of_prompt = made[0].guesses.copy()
            assert list(tokens) == truth.tokens[1:]
            guessed_bytes += sum(ticket.sent for ticket in made[0].guesses - of_prompt)
            logits_TV = engine.forward(PROMPT + truth.tokens)
        assert torch.equal(logits_TV.view(torch.int32), truth.logits_TV.view(torch.int32))

    with generous_link():
        check()
    assert guessed_bytes > 0


@given(
    policy=st.sampled_from(STREAMING),
    slots=st.integers(3, 24),
    seed=st.integers(0, 2**31),
    piece_bytes=st.sampled_from([None, 1500]),
)
@settings(max_examples=40, deadline=None)
def test_any_order_of_arrival(
    policy: str, slots: int, seed: int, piece_bytes: int | None, folder: Path, truth: Outcome
) -> None:
    """A virtual link completes copies, whole or in pieces, in an order drawn by ``seed``; slots are poisoned."""

    def virtual(store: ExpertStore, pool: SlotPool) -> VirtualCopyEngine:
        rng = random.Random(seed)
        return VirtualCopyEngine(VirtualClock(), lambda nbytes: 1e-3, store, pool, rng, piece_bytes=piece_bytes)

    with assembled(folder, policy, slots, virtual) as engine:
        assert tokens_of(engine, PROMPT, GREEDY) == truth.tokens
        logits_TV = engine.forward(PROMPT + truth.tokens)
    assert torch.equal(logits_TV.view(torch.int32), truth.logits_TV.view(torch.int32))


@given(
    policy=st.sampled_from(STREAMING), slots=st.integers(3, 24), in_ram=st.integers(0, 24), seed=st.integers(0, 2**31)
)
@settings(max_examples=30, deadline=None)
def test_a_device_behind_the_host(
    policy: str, slots: int, in_ram: int, seed: int, folder: Path, truth: Outcome
) -> None:
    """Copies are made as late as the marks between a device's lanes allow; some experts wait in RAM, some on disk."""

    def device(store: ExpertStore, pool: SlotPool) -> StreamCopyEngine:
        experts = [ExpertId(layer, expert) for layer in range(3) for expert in range(8)][:in_ram]
        streams = FakeStreams(random.Random(seed), host_computes=True)
        tiers = TieredStore(HostStore(store, experts), store)
        return StreamCopyEngine(tiers, pool, streams, piece_bytes=pool.rows_SB.shape[1] // 3)

    with assembled(folder, policy, slots, device) as engine:
        assert tokens_of(engine, PROMPT, GREEDY) == truth.tokens
        logits_TV = engine.forward(PROMPT + truth.tokens)
    assert torch.equal(logits_TV.view(torch.int32), truth.logits_TV.view(torch.int32))
