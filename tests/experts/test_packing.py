"""Packing: rows are the checkpoint's weights bit for bit; a pack appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.errors import CheckpointError, CopyError
from duoserve.experts import packing
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.pack_folder import LOCK_FILE
from duoserve.experts.pack_format import HEADER_FILE, PACK_FILE, read_pack_header
from duoserve.experts.packing import CheckpointStore, write_pack
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore
from duoserve.models.mixtral import FAMILY
from duoserve.models.opened import opened
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fakes import ArrayStore
from tests.models.cases import FAMILIES
from tests.models.cases.case import Case

EXPERTS = [ExpertId(layer, expert) for layer in range(3) for expert in range(8)]
KINDS: dict[str, dict[str, Any]] = {
    "single float32": {"dtype": torch.float32},
    "sharded bfloat16": {"dtype": torch.bfloat16, "shard": "20KB"},
    "odd width float16": {"dtype": torch.float16, "intermediate_size": 11},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("saved"), **KINDS[request.param])


def open_store(folder: Path, dtype: torch.dtype | None = None) -> CheckpointStore:
    checkpoint = Checkpoint.open(folder)
    stored = checkpoint.tensors["lm_head.weight"].dtype
    layout = ExpertLayout(dtype or stored, checkpoint.config["hidden_size"], checkpoint.config["intermediate_size"])
    return CheckpointStore(checkpoint, layout, partial(FAMILY.expert_pieces, config_of(checkpoint)))


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    return FAMILY.parse_config(checkpoint.config)


def read_row(store: ExpertStore, expert: ExpertId) -> Tensor:
    """The row of an expert, read over a row full of NaN."""
    row_B = aligned_rows(1, store.layout.slot_bytes)[0].fill_(0xFF)
    store.read(expert, row_B)
    return row_B


def expected_row(folder: Path, layout: ExpertLayout, expert: ExpertId) -> bytes:
    """The row by the words of the design, from the tensors as the safetensors library reads them."""
    tensors = {
        name: t.to(layout.stored) for file in folder.glob("*.safetensors") for name, t in load_file(file).items()
    }
    prefix = f"model.layers.{expert.layer}.block_sparse_moe.experts.{expert.expert}"
    w1, w2, w3 = (tensors[f"{prefix}.w{i}.weight"] for i in (1, 2, 3))
    rows = [row for pair in zip(w1, w3, strict=True) for row in pair]
    w13 = b"".join(row.view(torch.uint8).numpy().tobytes() for row in rows)
    down = w2.view(torch.uint8).numpy().tobytes()
    return (w13.ljust(-(-len(w13) // 256) * 256, b"\0") + down).ljust(layout.slot_bytes, b"\0")


def test_rows_are_the_weights_bit_for_bit(folder: Path) -> None:
    store = open_store(folder)
    for expert in (EXPERTS[0], EXPERTS[13], EXPERTS[-1]):
        assert read_row(store, expert).numpy().tobytes() == expected_row(folder, store.layout, expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_converted_to_the_layouts_dtype(folder: Path, dtype: torch.dtype) -> None:
    store = open_store(folder, dtype)
    assert read_row(store, EXPERTS[9]).numpy().tobytes() == expected_row(folder, store.layout, EXPERTS[9])


PARTED = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}


def saved(model_type: str, changes: dict[str, int], folder: Path) -> Path:
    return replace(FAMILIES[model_type], cases={"only": Case(changes)}).save(folder, "only")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["olmoe", "granitemoe"])
def test_a_row_in_parts_has_the_bytes_of_the_whole(
    model_type: str, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tensors an expert, or two for all; as they are, and converted."""
    with opened(saved(model_type, PARTED, tmp_path)) as model:
        store, expert = model.expert_store(stored), ExpertId(0, 3)
        whole_B = read_row(store, expert)
        for nbytes, count in ((4096, 3 * 2 * stored.itemsize // 4), (8 << 10, 3 * stored.itemsize // 4), (1 << 30, 2)):
            monkeypatch.setattr(packing, "PART_BYTES", nbytes)
            parts = store.parts(expert)
            assert len(parts) == max(count, 2)
            assert [part.start for part in parts] + [store.layout.slot_bytes] == [0, *(part.stop for part in parts)]
            for part in parts:
                part_B = aligned_rows(1, part.stop - part.start)[0].fill_(0xFF)
                store.read_part(expert, part, part_B)
                assert torch.equal(part_B, whole_B[part.start : part.stop])


def test_a_pack_made_of_parts_is_that_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PART_BYTES", 4096)
    with opened(save_mixtral(tmp_path / "saved", dtype=torch.float32, **PARTED)) as model:
        store = model.expert_store(torch.float32)
        write_pack(store, model.experts, tmp_path / "pack", "f")
        rows = b"".join(read_row(store, expert).numpy().tobytes() for expert in model.experts)
    assert len(store.parts(model.experts[0])) == 6 and (tmp_path / "pack" / PACK_FILE).read_bytes() == rows


def test_rows_that_no_page_divides_and_transposed_tensors_have_one_part(folder: Path, tmp_path: Path) -> None:
    store = open_store(folder)
    assert store.parts(EXPERTS[0]) == [(0, store.layout.slot_bytes)]
    with opened(saved("gpt_oss", PARTED, tmp_path)) as model:
        store = model.expert_store(torch.float32)
        assert not any(start < stop for start, stop in store.layout.gaps)
        assert store.parts(model.experts[0]) == [(0, store.layout.slot_bytes)]


def test_many_threads_may_read_at_once(folder: Path) -> None:
    store = open_store(folder)
    rows = {expert: read_row(store, expert) for expert in EXPERTS}
    wrong: list[ExpertId] = []

    def work(experts: list[ExpertId]) -> None:
        wrong.extend(expert for expert in experts if not torch.equal(read_row(store, expert), rows[expert]))

    threads = [threading.Thread(target=work, args=(EXPERTS[i:] + EXPERTS[:i],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_read_names_expert_file_and_offset(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    store = open_store(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    gate, _, _ = FAMILY.expert_pieces(config_of(checkpoint), ExpertId(2, 5))
    info = checkpoint.tensors[gate.name]
    checkpoint.close()
    os.truncate(info.file, info.offset)
    with pytest.raises(CopyError, match=f"expert 2/5, {info.file} from byte {info.offset}: .*changed after"):
        read_row(store, ExpertId(2, 5))


def test_an_expert_that_the_checkpoint_lacks_is_named(folder: Path) -> None:
    with pytest.raises(CopyError, match=r"expert 2/8: .*has no tensor '.*experts\.8\.w1\.weight'"):
        read_row(open_store(folder), ExpertId(2, 8))


def packed(path: Path, store: ArrayStore) -> bool:
    """Whether ``path`` is a whole pack of ``store``: its header, its rows, and no other file but the lock."""
    rows = b"".join(store.row(expert).numpy().tobytes() for expert in store.experts)
    header = read_pack_header(path)
    assert header.total_bytes == len(rows)
    assert sorted(p.name for p in path.iterdir()) == sorted([LOCK_FILE, PACK_FILE, HEADER_FILE])
    return header.fingerprint == fingerprint_of(store) and (path / PACK_FILE).read_bytes() == rows


def fingerprint_of(store: ArrayStore) -> str:
    return str(store.row(store.experts[0])[:8].tolist())


def pack(store: ArrayStore, path: Path) -> None:
    write_pack(store, store.experts, path, fingerprint_of(store))


def test_a_pack_holds_every_row_in_order(tmp_path: Path) -> None:
    store = ArrayStore(num_layers=3, num_experts=5)
    write_pack(store, store.experts[::-1], tmp_path / "new" / "pack", fingerprint_of(store))
    assert packed(tmp_path / "new" / "pack", store)
    assert sorted(store.reads) == store.experts  # each once


def test_a_pack_of_a_checkpoint_is_what_a_disk_store_reads(folder: Path, tmp_path: Path) -> None:
    store = open_store(folder)
    write_pack(store, EXPERTS, tmp_path, "f" * 64)
    disk = DiskStore(tmp_path, store.layout, 3, 8, "f" * 64)
    assert all(torch.equal(read_row(disk, expert), read_row(store, expert)) for expert in EXPERTS)
    disk.close()


def test_a_pack_with_gaps_keeps_its_places(tmp_path: Path) -> None:
    """A model's first layers may be dense, and then have no experts."""
    store = ArrayStore(num_layers=3, num_experts=2)
    write_pack(store, [ExpertId(1, 1), ExpertId(2, 0)], tmp_path, "f")
    rows = (tmp_path / PACK_FILE).read_bytes()
    zeros = bytes(store.layout.slot_bytes)
    one, two = (store.row(ExpertId(*e)).numpy().tobytes() for e in [(1, 1), (2, 0)])
    assert rows == zeros * 3 + one + two + zeros


def test_packing_again_replaces_the_pack(tmp_path: Path) -> None:
    old, new = ArrayStore(seed=1), ArrayStore(seed=2)
    pack(old, tmp_path)
    pack(new, tmp_path)
    assert packed(tmp_path, new)


def test_a_failed_packing_leaves_the_old_pack_and_no_rubbish(tmp_path: Path) -> None:
    old, failing = ArrayStore(seed=1), ArrayStore(seed=2, fail_reads=[5], error=lambda: CopyError("injected"))
    pack(old, tmp_path)
    with pytest.raises(CopyError, match="injected"):
        pack(failing, tmp_path)
    assert packed(tmp_path, old)


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))
    store = ArrayStore()
    with pytest.raises(CheckpointError, match=r"the disk is full: the pack takes 0\.00 GiB, 0\.00 GiB are free; make"):
        pack(store, tmp_path)
    assert not store.reads and [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full: the pack takes"), (errno.EIO, "the pack cannot be written .*Input/output")],
)
def test_a_disk_that_fails_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def fails(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: {message}.*DUOSERVE_CACHE"):
        pack(ArrayStore(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_layers_without_experts_take_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArrayStore(num_layers=3, num_experts=2)
    fits = 2 * store.layout.slot_bytes
    for free, refused in ((fits - 1, True), (fits, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(1 << 40, 0, free))
        with pytest.raises(CheckpointError, match="the disk is full") if refused else nullcontext():
            write_pack(store, [ExpertId(2, 0), ExpertId(2, 1)], tmp_path, "f")


def test_a_full_disk_is_said_where_no_folder_could_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", fails)
    with pytest.raises(CheckpointError, match=r"the disk is full: the pack takes .* GiB are free"):
        pack(ArrayStore(), tmp_path / "packs" / "one")


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_file_system_without_direct_writes_takes_others(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some refuse the flag, some take it and refuse the writes."""
    plain, refusals = getattr(os, refused), []

    def refusing(first: Any, *others: Any, **options: Any) -> int:
        flags = others[0] if refused == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refusals.append(flags)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return int(plain(first, *others, **options))

    monkeypatch.setattr(os, refused, refusing)
    store = ArrayStore(num_layers=2, num_experts=3)
    pack(store, tmp_path)
    assert refusals and packed(tmp_path, store)


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    store = ArrayStore(num_layers=2, num_experts=2)
    pack(store, tmp_path)
    assert packed(tmp_path, store)


def test_one_worker_is_left_for_the_disk(tmp_path: Path) -> None:
    """Never do all convert at once, and never does one alone while there is more to do."""
    counts, lock, crowd = [0], threading.Lock(), threading.Event()
    together = threading.Barrier(packing.WORKERS - 1, timeout=60)

    class Counting(ArrayStore):
        def read(self, expert: ExpertId, row_B: Tensor) -> None:
            with lock:
                counts.append(counts[-1] + 1)
            together.wait()
            if counts[-1] >= packing.WORKERS:
                crowd.set()
            crowd.wait(0.03)  # time for all to come
            super().read(expert, row_B)
            with lock:
                counts.append(counts[-1] - 1)

    store = Counting(num_layers=3, num_experts=2 * (packing.WORKERS - 1))
    pack(store, tmp_path)
    assert max(counts) == packing.WORKERS - 1 and packed(tmp_path, store)


@pytest.mark.parametrize(("forced", "shown"), [(True, True), (False, False)])
def test_the_progress_bar_shows_off_a_terminal_only_when_forced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], forced: bool, shown: bool
) -> None:
    store = ArrayStore()
    write_pack(store, store.experts, tmp_path, "f", progress=forced)
    assert ("packing experts" in capfd.readouterr().err) is shown
