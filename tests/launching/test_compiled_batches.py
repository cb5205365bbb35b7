"""Compiled steps of several sequences: the numbers of the model, the same bits under every policy, padding is nobody.

To save compiling, all tests decode in steps of four.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duoserve import MoEModel, SamplingParams
from duoserve.config import Phase
from duoserve.experts.copy_engine import ThreadedCopyEngine
from duoserve.interface import ServiceSettings
from duoserve.kernels.attention_together import decode_attention_together
from duoserve.kernels.compiled.compiler import CpuCompiler
from duoserve.kernels.reference import decode_attention
from duoserve.kv_cache import NewTokens
from duoserve.launching import compiled as compiled_decode
from duoserve.launching import compiled_experts, launch
from duoserve.launching.compiled import SIZES, CompiledStep, PaddedShapes, compiled_runner, compiled_steps
from duoserve.launching.compiled_experts import CompiledExperts
from duoserve.launching.launch import StepParts
from duoserve.launching.recorded import RecordedRunner
from duoserve.loading import load
from duoserve.models.moe import MoEBlock
from duoserve.passes import Passes, StepRunner
from duoserve.service.async_engine import AsyncEngine
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.compiled_case import few_streams, needs_compiler, save
from tests.helpers.fakes import Gate
from tests.helpers.lagging import Truth, write
from tests.helpers.listeners import Heard
from tests.helpers.loops import in_a_loop
from tests.helpers.toys import greedy, toy_prompt
from tests.models.cases import FAMILIES
from tests.models.test_families import decoded
from tests.models.test_mixtral_parity import relative_error

PROMPTS = [toy_prompt(length) for length in (7, 30, 1)]
MAX_TOKENS = (8, 5, 9)  # they leave one after the other, so that there is more and more padding
GREEDY = greedy(9)
TYPES = ("mixtral", "deepseek_v3", "gpt_oss")
Before = Callable[[StepParts, NewTokens], None]
COMPILER = CpuCompiler()  # that of all engines that are assembled here, so that what is alike is compiled once


@pytest.fixture(scope="module", params=TYPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def fours(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Models compile steps for up to four sequences only, no prompts; has how many were somebody's, step by step."""
    sequences, step = [], CompiledStep.__call__
    monkeypatch.setattr(launch, "compiled_runner", partial(compiled_runner, sizes=SIZES[1:]))
    monkeypatch.setattr(load, "compiled_prompts", lambda model, cache: model)
    monkeypatch.setattr(
        CompiledStep,
        "__call__",
        lambda self, new_tokens: sequences.append(len(new_tokens.spans)) or step(self, new_tokens),
    )
    return sequences


def in_fours(
    logits: list[Tensor], before: Before = lambda parts, new_tokens: None
) -> Callable[[StepParts], StepRunner]:
    """Makes runners that note their ``logits``; ``before`` is called before each step."""

    def make(parts: StepParts) -> StepRunner:
        steps = compiled_steps(parts.model, parts.cache, COMPILER, SIZES[-1])
        fours = PaddedShapes((4,), parts.cache.num_pages)
        decode = RecordedRunner(parts.model, parts.cache, steps, record_after=0, shapes=fours)

        def step(new_tokens: NewTokens) -> Tensor:
            decode.prepare(4)
            before(parts, new_tokens)
            logits.append(decode(new_tokens).clone())
            return logits[-1]

        return step

    return make


@needs_compiler
def test_a_batch_has_the_logits_of_the_model_under_every_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if _family(folder) != "mixtral":
        few_streams(monkeypatch)
    top_k = 2 if folder.name.startswith("mixtral") else FAMILIES[_family(folder)].top_k
    truth = Truth(folder, _num_experts(folder), PROMPTS, MAX_TOKENS)
    found: list[list[Tensor]] = []
    for policy, slots in (("lru", max(9, 2 * top_k)), ("duoserve", 3 * top_k), ("on-demand", top_k + 1)):
        found.append([])
        with assembled(folder, policy, slots, ThreadedCopyEngine, make_step_runner=in_fours(found[-1])) as engine:
            assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens, policy
    for true_BV, *others in zip(truth.logits, *found, strict=True):
        assert relative_error(others[0], true_BV) <= 1e-5
        assert all(torch.equal(others[0], other) for other in others)


def _family(folder: Path) -> str:
    return next(name for name in TYPES if folder.name.startswith(name))


def _num_experts(folder: Path) -> int:
    return 24 if _family(folder) == "mixtral" else FAMILIES[_family(folder)].experts


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Before:
    """Puts NaN wherever nobody's numbers are."""
    made: list[CompiledExperts] = []
    init = CompiledExperts.__init__
    monkeypatch.setattr(CompiledExperts, "__init__", lambda self, *args: made.append(self) or init(self, *args))

    def before(parts: StepParts, new_tokens: NewTokens) -> None:
        for rows in made[-1].rows:
            rows.fill_(float("nan"))
        for pages_PSW in [pages for layer in parts.cache.layers for pages in layer]:
            pages_PSW[parts.cache._free] = float("nan")

    return before


@needs_compiler
def test_padding_has_no_part_in_the_bits_of_a_step(mixtral: Path, poison: Before) -> None:
    clean, poisoned = [], []
    for logits, before in ((clean, lambda parts, new_tokens: None), (poisoned, poison)):
        with assembled(mixtral, "lru", 9, ThreadedCopyEngine, make_step_runner=in_fours(logits, before)) as engine:
            write(engine, PROMPTS, MAX_TOKENS)
    assert all(torch.equal(one, other) for one, other in zip(clean, poisoned, strict=True))


@needs_compiler
def test_padding_wants_no_experts_and_nobody_is_told_of_it(mixtral: Path, poison: Before) -> None:
    heard = Heard()
    with assembled(mixtral, "lru", 9, ThreadedCopyEngine, heard, make_step_runner=in_fours([], poison)) as engine:
        write(engine, PROMPTS, MAX_TOKENS)
        stats = engine.meter.snapshot()
    told = [
        (len(requests), routing)
        for (phase, requests), routings in zip(heard.begun, heard.routings, strict=True)
        if phase is Phase.DECODE
        for routing in routings
    ]
    assert all(len(routing.topk_ids_TK) == len(routing.topk_weights_TK) == rows for rows, routing in told)
    assert {rows for rows, _ in told} == {1, 2, 3}
    wanted = sum(len(set(routing.topk_ids_TK.ravel().tolist())) for _, routing in told)
    assert stats.hits["decode"] + stats.misses["decode"] == wanted


@needs_compiler
def test_a_step_writes_to_the_pages_of_its_sequences_only(mixtral: Path) -> None:
    before: list[list[Tensor]] = []

    def look(parts: StepParts, new_tokens: NewTokens) -> None:
        rows = [pages.flatten(0, 1).flatten(1).view(torch.int32) for layer in parts.cache.layers for pages in layer]
        if before:
            changed = [(now != then).any(1).nonzero().flatten() for now, then in zip(rows, before, strict=True)]
            assert all(set(rows_C.tolist()) <= set(written[-1]) for rows_C in changed)
        written.append(new_tokens.rows)
        before[:] = [pages.clone() for pages in rows]

    written: list[list[int]] = []
    with assembled(mixtral, "lru", 9, ThreadedCopyEngine, make_step_runner=in_fours([], look)) as engine:
        write(engine, PROMPTS, MAX_TOKENS)
    assert len(written) == max(MAX_TOKENS) - 1


@needs_compiler
def test_requests_join_and_leave_while_others_go_on(
    mixtral: Path, fours: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, decode = Gate(), Passes.decode
    with MoEModel.from_pretrained(mixtral) as model:
        expected = [model.generate(prompt, GREEDY, max_tokens=count).token_ids for prompt, count in _staggered()]
        sampled = model.generate(PROMPTS[0], GREEDY, temperature=0.9, seed=5).token_ids
    monkeypatch.setattr(Passes, "decode", lambda *args: gate.pass_through() or decode(*args))
    with MoEModel.from_pretrained(mixtral, expert_slots=9, policy="duoserve", decode_mode="compiled") as model:
        assert _together(model, gate) == [*expected, sampled]
    assert fours == [1] + [4] * 5 + [3] * 3 + [2] * 3 + [1] * 11


def _staggered() -> list[tuple[list[int], int]]:
    return list(zip(PROMPTS, (24, 6, 12), strict=True))


@in_a_loop
async def _together(model: MoEModel, gate: Gate) -> list[list[int]]:
    """The others come while the first is in its first decode step, at ``gate``; the fourth samples."""
    service = AsyncEngine(model)

    async def told(prompt: Sequence[int], params: SamplingParams) -> list[int]:
        stream = await service.submit(prompt, params, logprobs=3)
        return [place.token_id async for piece in stream for place in piece.logprobs]

    try:
        wanted = [(prompt, replace(GREEDY, max_tokens=count)) for prompt, count in _staggered()]
        wanted.append((PROMPTS[0], replace(GREEDY, temperature=0.9, seed=5)))
        running = [asyncio.create_task(told(*wanted[0]))]
        await asyncio.to_thread(gate.wait_entered)
        running += [asyncio.create_task(told(*one)) for one in wanted[1:]]
        while len(service._worker._asked) < 3:
            await asyncio.sleep(0.002)
        gate.open()
        return await asyncio.gather(*running)
    finally:
        gate.open()
        await service.close()


@needs_compiler
def test_more_sequences_than_a_step_takes_are_computed_by_the_model(
    mixtral: Path, fours: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordedRunner, "prepare", lambda runner, num_sequences: None)  # nothing need be compiled
    prompts = [PROMPTS[1][:length] for length in range(2, 3 + SIZES[-1])]
    with MoEModel.from_pretrained(mixtral, max_context=2048) as model:
        expected = [out.token_ids for out in model.generate(prompts, GREEDY)]
    with MoEModel.from_pretrained(mixtral, max_context=2048, decode_mode="compiled") as model:
        assert [out.token_ids for out in model.generate(prompts, GREEDY)] == expected
    assert fours == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the steps that were to be compiled; none is."""
    sizes: list[int] = []

    def recorded(model: object, cache: object, compiler: object, most: int) -> Callable[[int, int], None]:
        return lambda num_sequences, width: sizes.append(num_sequences)

    monkeypatch.setattr(compiled_decode, "compiled_steps", recorded)
    return sizes


def _compiled(parts: StepParts) -> StepRunner:
    return compiled_runner(parts.model, parts.cache)


def test_a_step_has_the_least_size_that_it_fits_in(mixtral: Path, asked: list[int]) -> None:
    with assembled(mixtral, "lru", 9, ThreadedCopyEngine, make_step_runner=_compiled) as engine:
        assert asked == [1]
        write(engine, [[5]] * 4, (2, 3, 5, 6))
    assert asked == [1, 4]


def test_a_service_prepares_the_sizes_of_its_batches(mixtral: Path, asked: list[int]) -> None:
    with assembled(mixtral, "lru", 9, ThreadedCopyEngine, make_step_runner=_compiled) as engine:
        for max_batch, sizes in ((1, [1]), (4, [1, 4]), (5, [1, 4, 16]), (40, [1, 4, 16])):
            engine.serve_by(ServiceSettings(max_batch=max_batch))
            assert asked == sizes


@needs_compiler
@pytest.mark.parametrize(("quantize", "most"), [("bf12", 16), ("int4", 16), ("int8", 2)])
def test_quantized_experts_of_few_and_of_many_rows(
    quantize: str, most: int, tmp_path: Path, fours: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four equal prompts: each expert has four rows, for one call, for two, or for the model's ops."""
    batches = PROMPTS, PROMPTS[:1] * 4
    sizes = compiled_experts.call_rows
    monkeypatch.setattr(compiled_experts, "call_rows", lambda weights: sizes(weights)._replace(most=most))
    dtype = torch.bfloat16 if quantize == "bf12" else torch.float32
    shape = {"hidden_size": 128, "intermediate_size": 256} if quantize == "int4" else {}
    folder = save_mixtral(tmp_path, dtype=dtype, **shape)
    options = {"quantize": quantize, "dtype": "float32"}
    with MoEModel.from_pretrained(folder, **options) as model:
        expected = [[out.token_ids for out in model.generate(prompts, GREEDY)] for prompts in batches]
        alone, top = decoded(model, PROMPTS[0], 9)
    rows, compute = [], MoEBlock.compute
    monkeypatch.setattr(
        MoEBlock, "compute", lambda self, routed, work: rows.append(len(routed.x_TH)) or compute(self, routed, work)
    )
    with MoEModel.from_pretrained(folder, decode_mode="compiled", **options) as model:
        assert [[out.token_ids for out in model.generate(prompts, GREEDY)] for prompts in batches] == expected
        found, found_top = decoded(model, PROMPTS[0], 9)
    assert found == alone
    assert relative_error(found_top, top) <= 1e-5
    assert fours and (4 in rows) == (most < 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(70, 64, 3), (9, 0), (5, 300), (65, 65, 0, 0)])
def test_attention_together_is_attention(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of lengths that are too unlike, too, and with padding; pages that are nobody's are NaN."""
    torch.manual_seed(0)
    q_BHD = torch.randn(len(lengths), 4, 16).to(dtype)
    k_PSGD, v_PSGD = torch.full((2, 12, 64, 2, 16), float("nan"), dtype=dtype)
    free, tables = iter(torch.randperm(12).tolist()), []
    for length in lengths:
        tables.append([next(free) for _ in range(-(-length // 64))])
        for at in range(length):
            k_PSGD[tables[-1][at // 64], at % 64], v_PSGD[tables[-1][at // 64], at % 64] = torch.randn(2, 2, 16)
    table_BM = torch.tensor([pages + [-1] * (8 - len(pages)) for pages in tables], dtype=torch.int32)
    operands = q_BHD, k_PSGD, v_PSGD, table_BM, torch.tensor(lengths, dtype=torch.int32), 0.3
    for window in (None, 40):
        expected = decode_attention(*operands, window)
        assert relative_error(decode_attention_together(*operands, window).float(), expected.float()) <= (
            1e-6 if dtype is torch.float32 else 1e-2
        )
