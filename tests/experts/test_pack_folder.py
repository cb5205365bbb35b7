"""The folder of a pack: where it is, who writes there, and when what is there is made again."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duoserve import MoEModel
from duoserve.errors import CheckpointError
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.layout import ExpertLayout
from duoserve.experts.pack_folder import SCRATCH, cache_folder, pack_path
from duoserve.experts.pack_format import HEADER_FILE, PACK_FILE
from duoserve.experts.packing import write_pack
from duoserve.files.whole import scratch_folder
from tests.experts.test_packing import pack, packed, read_row
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fakes import ArrayStore
from tests.models.cases import FAMILIES

PROMPT = list(range(2, 40))
WEIGHTS = "model.safetensors"
KILLED = """
import os, sys
from pathlib import Path
from duoserve.experts.pack_folder import SCRATCH
from duoserve.files.whole import scratch_folder
with scratch_folder(Path(sys.argv[1]), SCRATCH) as folder:
    (folder / "rows").write_bytes(b"many")
    os.kill(os.getpid(), 9)
"""


def leave_scratch(folder: Path) -> Path:
    """What a process leaves that is killed while it packs."""
    folder.mkdir(exist_ok=True)
    assert subprocess.run([sys.executable, "-c", KILLED, folder], check=False).returncode == -9
    [left] = folder.glob(f"{SCRATCH}*")
    return left


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    left = [leave_scratch(folder) for folder in (here, elsewhere)]
    with scratch_folder(elsewhere, f"{SCRATCH}of-another-") as others:
        pack(ArrayStore(), here)
        assert others.exists() and not any(folder.exists() for folder in left)
    assert packed(here, ArrayStore())


def test_what_was_left_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leave_scratch(tmp_path / "elsewhere")
    usage = lambda _: shutil._ntuple_diskusage(1 << 40, 0, 0 if left.exists() else 1 << 30)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    pack(ArrayStore(), tmp_path / "here")
    assert packed(tmp_path / "here", ArrayStore())


def test_of_two_equal_packs_the_first_stays(tmp_path: Path) -> None:
    """Who reads it goes on reading it; but one that is damaged is replaced."""
    store = ArrayStore()
    pack(store, tmp_path)
    first = (tmp_path / PACK_FILE).stat().st_ino
    pack(store, tmp_path)
    assert (tmp_path / PACK_FILE).stat().st_ino == first
    os.truncate(tmp_path / PACK_FILE, 5)
    pack(store, tmp_path)
    assert packed(tmp_path, store)


def test_packs_written_at_once_do_not_mix(tmp_path: Path) -> None:
    stores = [ArrayStore(seed=seed) for seed in range(6)]
    threads = [threading.Thread(target=pack, args=(store, tmp_path)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(packed(tmp_path, store) for store in stores) == 1


def test_the_lock_keeps_two_packs_from_mixing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pack is finished while the first stands between its two renames, the worst moment there is."""
    first, second = ArrayStore(seed=1), ArrayStore(seed=2)
    replace: Callable[[Path, Path], Path] = Path.replace
    late = threading.Thread(target=pack, args=(second, tmp_path))

    def replace_slowly(source: Path, target: Path) -> Path:
        moved = replace(source, target)
        if target.name == PACK_FILE and not late.ident:
            late.start()
            late.join(0.3)
        return moved

    monkeypatch.setattr(Path, "replace", replace_slowly)
    pack(first, tmp_path)
    late.join()
    assert packed(tmp_path, second)


def test_of_two_that_pack_the_same_at_once_one_waits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = ArrayStore(), ArrayStore()
    gate, did = first.gate(first.experts[-1]), {}

    def write(store: ArrayStore, name: str) -> None:
        did[name] = write_pack(store, store.experts, tmp_path, "f")

    threads = [threading.Thread(target=write, args=pair) for pair in ((first, "first"), (second, "second"))]
    threads[0].start()
    gate.wait_entered()
    threads[1].start()
    threads[1].join(0.5)
    assert threads[1].is_alive() and not second.reads
    gate.open()
    for thread in threads:
        thread.join()
    assert did == {"first": True, "second": False} and not second.reads
    assert capfd.readouterr().err.count(f"{tmp_path}: another process is packing there") == 1


def logits(folder: Path, cache: Path | None) -> Tensor:
    """From the pack; without a cache, from slots for all experts."""
    options: dict[str, Any] = {} if cache is None else {"expert_slots": 6, "host_memory": "0", "cache_dir": cache}
    with MoEModel.from_pretrained(folder, **options) as model:
        return model.forward(PROMPT)


def change(folder: Path, *names: str, entry: int) -> None:
    """Other values in one entry of each tensor, in a file that is saved anew."""
    tensors = load_file(folder / WEIGHTS)
    for name in names:
        tensors[name][entry] = tensors[name][entry].flip(0) * 3 + 1
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_an_expert_changed_in_place_is_served(tmp_path: Path) -> None:
    """The file is as old as it was; all experts of a layer are one tensor."""
    folder, cache = FAMILIES["granitemoe"].save(tmp_path / "model", "plain"), tmp_path / "cache"
    before, status = logits(folder, cache), (folder / WEIGHTS).stat()
    names = [f"model.layers.{n}.block_sparse_moe.{m}_linear.weight" for n in range(3) for m in ("input", "output")]
    change(folder, *names, entry=1)
    os.utime(folder / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(logits(folder, cache), logits(folder, None))
    assert not torch.equal(logits(folder, cache), before)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """Its matrices are larger than what a fingerprint has of them."""
    return save_mixtral(tmp_path / "model", hidden_size=64, intermediate_size=64)


def test_a_changed_row_is_served(mixtral: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logits(mixtral, tmp_path / "cache")
    names = [f"model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight" for n in range(3) for e in range(8)]
    change(mixtral, *names, entry=0)
    assert torch.equal(logits(mixtral, tmp_path / "cache"), logits(mixtral, None))
    assert not torch.equal(logits(mixtral, tmp_path / "cache"), before)
    assert len(list((tmp_path / "cache" / "packs").iterdir())) == 1
    assert capfd.readouterr().err.count("the checkpoint is newer than this pack: packing it again") == 1


def test_a_pack_that_may_not_be_replaced_serves_as_it_is(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache that many share, whose pack is older than this user's copy of the checkpoint."""
    expected = logits(mixtral, tmp_path / "cache")
    os.utime(mixtral / WEIGHTS)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))
    with pytest.warns(UserWarning, match=f"is older than {mixtral}, and may not be made again"):
        assert torch.equal(logits(mixtral, tmp_path / "cache"), expected)


def test_a_file_of_the_future_is_packed_once(mixtral: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where the folder has but a link to it, as a hub's cache has."""
    (mixtral / WEIGHTS).rename(tmp_path / "blob")
    (mixtral / WEIGHTS).symlink_to(tmp_path / "blob")
    logits(mixtral, tmp_path / "cache")
    [path] = (tmp_path / "cache").rglob(PACK_FILE)
    packs, future = [path.stat().st_ino], (path.stat().st_mtime_ns // 10**9 + 10**6) * 10**9 + 1
    os.utime(tmp_path / "blob", ns=(future, future))
    for _ in range(3):
        with path.open("rb"):  # or its number could be given to the next
            logits(mixtral, tmp_path / "cache")
            packs.append(path.stat().st_ino)
    assert packs[0] != packs[1] == packs[2] == packs[3]
    assert capfd.readouterr().err.count("packing it again") == 1


def test_what_is_changed_while_it_is_packed_is_packed_again(tmp_path: Path) -> None:
    """The change is older than the finished pack."""
    changed = tmp_path / "changed"

    class Changing(ArrayStore):
        def read(self, expert: Any, row_B: Tensor) -> None:
            super().read(expert, row_B)
            if expert == self.experts[-1]:
                changed.write_text("")

    store = Changing()
    write_pack(store, store.experts, tmp_path / "pack", "f", changed_ns=1)
    assert not write_pack(store, store.experts, tmp_path / "pack", "f", changed_ns=1)
    assert write_pack(store, store.experts, tmp_path / "pack", "f", changed_ns=changed.stat().st_mtime_ns)


def test_a_pack_in_use_outlives_the_one_that_replaces_it(tmp_path: Path) -> None:
    old, new = ArrayStore(seed=1), ArrayStore(seed=2)
    write_pack(old, old.experts, tmp_path, "f")
    disk = DiskStore(tmp_path, old.layout, old.num_layers, old.num_experts, "f")
    assert write_pack(new, new.experts, tmp_path, "f", changed_ns=(tmp_path / HEADER_FILE).stat().st_mtime_ns + 1)
    assert all(torch.equal(read_row(disk, expert), old.row(expert)) for expert in old.experts)
    disk.close()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "DUOSERVE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_who_has_no_home_needs_another_cache(mixtral: Path, tmp_path: Path) -> None:
    assert cache_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="no home directory: set DUOSERVE_CACHE"):
        cache_folder()
    with pytest.raises(CheckpointError, match="no home directory: set DUOSERVE_CACHE"):
        MoEModel.from_pretrained(mixtral, expert_slots=6, host_memory="0")
    MoEModel.from_pretrained(mixtral).close()
    MoEModel.from_pretrained("bard").close()


def test_the_pack_path_tells_checkpoints_and_dtypes_apart(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(mixtral)
    layout = ExpertLayout(torch.bfloat16, 32, 24)
    name = f"{checkpoint.fingerprint()}-bfloat16"
    assert pack_path(checkpoint, layout, tmp_path) == tmp_path / "packs" / name
    monkeypatch.setenv("DUOSERVE_CACHE", str(tmp_path / "env"))
    assert pack_path(checkpoint, layout, None) == tmp_path / "env" / "packs" / name
    monkeypatch.setenv("DUOSERVE_CACHE", "~/env")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pack_path(checkpoint, layout) == tmp_path / "env" / "packs" / name
    assert pack_path(checkpoint, layout, "~/given") == tmp_path / "given" / "packs" / name
    monkeypatch.delenv("DUOSERVE_CACHE")
    assert pack_path(checkpoint, layout) == tmp_path / ".cache" / "duoserve" / "packs" / name
    assert pack_path(checkpoint, ExpertLayout(torch.float32, 32, 24)).name.endswith("-float32")
    checkpoint.close()
