"""Memory that is refused in a pass, in a service or while a model is loaded: one clear error, and the next one runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from duoserve import AsyncEngine, CompilerError, MemoryBudgetError, MoEModel, ServiceState
from duoserve.models.transformer import Transformer
from duoserve.passes import Passes
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.live_threads import threads_since
from tests.helpers.loops import in_a_loop
from tests.helpers.toys import greedy

PROMPT = [5, 9, 2, 40, 41, 7]
GREEDY = greedy(8)
REFUSAL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the notes")
SAID = r"^out of memory while a pass was computed \(.+\): free some, or lower expert_slots, memory, host_memory or max"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("memory"))


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained(folder, expert_slots=4, policy="lru", cache_dir=tmp_path) as model:
        yield model


class Once:
    """Raises ``error`` in place of the ``number``-th call, from 0, of a method of the model's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, error: BaseException) -> None:
        self.left, self.error, self.arguments = number, error, []
        inner = getattr(Transformer, name)
        monkeypatch.setattr(Transformer, name, lambda *args: self._refuse(args[1]) or inner(*args))

    def _refuse(self, argument: Any) -> None:
        self.left -= 1
        if self.left == -1:
            self.arguments.append(weakref.ref(argument))
            raise self.error


@pytest.mark.parametrize(
    ("name", "number"),
    [("start", 0), ("advance", 0), ("advance", 1), ("advance", 4)],
    ids=["begun", "prompt", "first step", "later step"],
)
def test_a_pass_that_is_refused_memory_ends_its_request_only(
    name: str, number: int, model: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.generate(PROMPT, GREEDY).token_ids
    once = Once(monkeypatch, name, number, REFUSAL)
    with pytest.raises(MemoryBudgetError, match=SAID) as caught:
        model.generate(PROMPT, GREEDY)
    assert caught.value.__cause__ is REFUSAL and "See the notes" not in str(caught.value)
    assert once.left == -1
    model._runtime.engine.check_integrity()
    assert model.generate(PROMPT, GREEDY).token_ids == whole


def test_logits_that_are_refused_memory_leave_the_model_usable(
    model: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_TV = model.forward(PROMPT)
    Once(monkeypatch, "advance", 0, REFUSAL)
    with pytest.raises(MemoryBudgetError, match=SAID):
        model.forward(PROMPT)
    assert torch.equal(model.forward(PROMPT), logits_TV)


def test_who_keeps_the_error_keeps_nothing_of_the_pass(model: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be just what was short, and whoever handles the error may ask for less at once."""
    for ask in (lambda: model.generate(PROMPT, GREEDY), lambda: model.forward(PROMPT)):
        with monkeypatch.context() as patch:
            once = Once(patch, "advance", 0, torch.OutOfMemoryError("CUDA out of memory"))
            with pytest.raises(MemoryBudgetError) as caught:
                ask()
            gc.collect()
            assert [argument() for argument in once.arguments] == [None] and caught.value is not None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=str,
)
def test_whoever_refuses_it_it_is_the_same(error: Exception, model: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    Once(monkeypatch, "advance", 0, error)
    with pytest.raises(MemoryBudgetError, match=SAID):
        model.forward(PROMPT)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), CompilerError("cc1plus: out of memory")], ids=str)
def test_other_errors_stay_what_they_are(error: Exception, model: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    Once(monkeypatch, "advance", 0, error)
    with pytest.raises(type(error)) as caught:
        model.forward(PROMPT)
    assert caught.value is error


@pytest.mark.parametrize("number", [0, 3], ids=["prompt", "step"])
@in_a_loop
async def test_in_a_service_it_ends_the_requests_of_its_pass_and_the_service_goes_on(
    number: int, model: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.generate(PROMPT, GREEDY).token_ids
    service = AsyncEngine(model)
    try:
        Once(monkeypatch, "advance", number, REFUSAL)
        stream = await service.submit(PROMPT, GREEDY)
        with pytest.raises(MemoryBudgetError, match=SAID):
            _ = [piece async for piece in stream]
        assert service.state is ServiceState.READY and service.figures().finished == {"error": 1}
        stream = await service.submit(PROMPT, GREEDY)
        assert [token async for piece in stream for token in piece.token_ids] == whole
    finally:
        await service.close()


def test_a_service_that_cannot_get_ready_for_its_batches_says_so(
    model: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise REFUSAL

    with monkeypatch.context() as patch:
        patch.setattr(Passes, "prepare", refuse)
        with pytest.raises(MemoryBudgetError, match="out of memory while decode steps were made ready"):
            AsyncEngine(model)
    assert len(model.generate(PROMPT, GREEDY).token_ids) == 8


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    "part",
    ["wiring.Scheduler", "load.PagedKVCache", "load._transformer_and_tap", "load._prompts_and_runner"],
)
def test_a_load_that_is_refused_memory_leaves_nothing_open(
    part: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise REFUSAL

    def load() -> MoEModel:
        return MoEModel.from_pretrained(folder, expert_slots=4, policy="lru", host_memory=0, cache_dir=tmp_path)

    load().close()
    gc.collect()
    alive, files = threads_since(), open_files()
    monkeypatch.setattr(f"duoserve.loading.{part}", refuse)
    with pytest.raises(MemoryBudgetError, match=r"out of memory while the model was loaded \(CUDA out of memory"):
        load()
    gc.collect()
    assert alive() == 0 and open_files() == files
