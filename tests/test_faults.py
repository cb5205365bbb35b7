"""Disks that fail, files that shrink and copy threads that stumble: one clear error, and the next request runs."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from duoserve import CheckpointError, CopyError, DuoServeError, MemoryBudgetError, MoEModel
from duoserve.engine import Engine
from duoserve.experts.copy_engine import ThreadedCopyEngine
from duoserve.experts.layout import ExpertId
from duoserve.experts.pack_format import PACK_FILE
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.loading.placement import Placement
from tests.helpers.assembly import assembled, tokens_of
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fake_streams import FakeStreams
from tests.helpers.live_threads import threads_since
from tests.helpers.toys import greedy

PROMPT = [5, 9, 2, 40, 41, 7]
GREEDY = greedy(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("faults"))


class FaultyStore(ExpertStore):
    """Hands reads through to another store until ``armed``; then the read after ``countdown`` more raises ``error``."""

    def __init__(self, inner: ExpertStore) -> None:
        self.layout = inner.layout
        self.error: BaseException | None = None
        self.countdown = 0
        self._inner = inner

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        if self.error is not None:
            self.countdown -= 1
            if self.countdown < 0:
                error, self.error = self.error, None
                raise error
        self._inner.read(expert, row_B)

    def close(self) -> None:
        self._inner.close()


def test_a_pack_truncated_while_running(folder: Path, tmp_path: Path) -> None:
    with MoEModel.from_pretrained(folder, expert_slots=3, cache_dir=tmp_path) as model:
        whole = model.generate(PROMPT, GREEDY).token_ids
        [pack] = tmp_path.rglob(PACK_FILE)
        content = pack.read_bytes()
        os.truncate(pack, len(content) // 2)
        with pytest.raises(CopyError, match=rf"{PACK_FILE}") as caught:
            model.generate(PROMPT, GREEDY)
        assert "expert" in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(CopyError):
            model.generate(PROMPT, GREEDY)
        pack.write_bytes(content)  # the same inode, as a disk that comes back
        assert model.generate(PROMPT, GREEDY).token_ids == whole


def test_a_shard_truncated_while_it_is_packed(folder: Path, tmp_path: Path) -> None:
    broken = save_mixtral(tmp_path / "model")
    [shard] = broken.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MoEModel.from_pretrained(broken, expert_slots=3, cache_dir=tmp_path)


@pytest.mark.parametrize("policy", ["on-demand", "layer-prefetch", "lru"])
@pytest.mark.parametrize("countdown", [0, 3, 20, 40])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no room"), SystemExit(3)])
def test_a_copy_that_fails_ends_its_request_only(
    folder: Path, policy: str, countdown: int, error: BaseException
) -> None:
    stores: list[FaultyStore] = []

    def faulty(store: ExpertStore, pool: SlotPool) -> ThreadedCopyEngine:
        stores.append(FaultyStore(store))
        return ThreadedCopyEngine(stores[0], pool)

    def run(engine: Engine) -> list[int]:
        return tokens_of(engine, PROMPT, GREEDY)

    with assembled(folder, policy, 4, faulty) as engine:
        whole = run(engine)
        stores[0].countdown, stores[0].error = countdown, error
        try:
            assert run(engine) == whole  # the copy that failed was a guess that nobody needed
        except DuoServeError as caught:
            assert isinstance(caught, CopyError)
            assert type(error).__name__ in str(caught) or caught is error
        assert stores[0].error is None, "the fault was never met"
        assert run(engine) == whole
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("duoserve-copy")]


def test_copy_threads_end_with_a_load_that_fails_behind_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StreamCopyEngine] = []

    def copy_engine(_: Placement, store: ExpertStore, pool: SlotPool, *__: object) -> StreamCopyEngine:
        made.append(StreamCopyEngine(store, pool, FakeStreams(random.Random(0))))
        return made[0]

    def fails(*_: object) -> None:
        assert made and alive() == 2
        raise MemoryError("no room for the books")

    alive = threads_since()
    monkeypatch.setattr(Placement, "copy_engine", copy_engine)
    monkeypatch.setattr("duoserve.loading.wiring.Scheduler", fails)
    with pytest.raises(MemoryBudgetError, match=r"while the model was loaded \(no room for the books\)"):
        MoEModel.from_pretrained(folder)
    assert alive() == 0


def test_copies_are_closed_with_a_scheduler_that_has_too_few_slots(folder: Path) -> None:
    closed = []

    class Noting(ThreadedCopyEngine):
        def close(self) -> None:
            closed.append(self)
            super().close()

    with (
        pytest.raises(MemoryBudgetError, match="keeps all 24 experts in slots"),
        assembled(folder, "resident", 4, Noting),
    ):
        pass
    assert len(closed) == 1


def test_weights_that_are_not_finite_end_the_request(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with (
        MoEModel.from_pretrained(folder) as model,
        pytest.raises(DuoServeError, match="non-finite logits"),
    ):
        model.generate(PROMPT, GREEDY)
