"""``duoserve pack``: what it writes is what the engine reads."""

import torch

from duoserve.cli import pack
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.layout import ExpertId
from duoserve.experts.rows import aligned_rows
from duoserve.models.opened import opened


def test_the_pack_holds_the_experts_of_the_checkpoint(duoserve, model_folder, tmp_path):
    ran = duoserve("pack", model_folder, "--out", tmp_path / "fast", "--dtype", "float16")
    assert ran.code == 0
    (path,) = (tmp_path / "fast" / "packs").iterdir()
    assert ran.out == f"packed: 24 experts, 192.00 KiB, {path}\n"
    with opened(str(model_folder)) as model:
        layout = model.layout(torch.float16)
        disk = DiskStore(path, layout, 3, 8, model.checkpoint.fingerprint())
        packed, expected = aligned_rows(2, layout.slot_bytes)
        disk.read(ExpertId(2, 5), packed)
        model.expert_store(torch.float16).read(ExpertId(2, 5), expected)
        disk.close()
    assert torch.equal(packed, expected)


def test_a_pack_that_is_there_is_kept_and_a_broken_one_made_anew(duoserve, model_folder, tmp_path, monkeypatch):
    duoserve("pack", model_folder)
    (path,) = (tmp_path / "cache" / "packs").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_pack", None)
        assert duoserve("pack", model_folder).out.startswith("already packed: 24 experts")
    (path / "pack.json").write_text("{}")
    assert duoserve("pack", model_folder).out.startswith("packed: 24 experts")
    assert duoserve("pack", model_folder).out.startswith("already packed")


def test_an_unwritable_folder_is_one_error(duoserve, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    ran = duoserve("pack", model_folder, "--out", tmp_path / "file")
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("duoserve: error: ")
