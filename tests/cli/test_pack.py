"""``duoserve pack``: what it writes is what the engine reads."""

import json
import os
import re
import shutil
import threading

import pytest
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


def test_a_pack_older_than_the_checkpoint_is_made_anew(duoserve, model_folder, tmp_path):
    duoserve("pack", model_folder)
    (path,) = (tmp_path / "cache" / "packs").iterdir()
    os.utime(path / "pack.json", (1, 1))
    ran = duoserve("pack", model_folder)
    assert ran.out.startswith("packed: 24 experts") and f"{path}: the checkpoint is newer than this pack" in ran.err
    assert duoserve("pack", model_folder).out.startswith("already packed")


def test_an_unwritable_folder_is_one_error(duoserve, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    ran = duoserve("pack", model_folder, "--out", tmp_path / "file")
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("duoserve: error: ")


def test_quantizing_says_what_it_costs(duoserve, model_folder, tmp_path):
    (tmp_path / "text").write_text("To be, or not to be, that is the question")
    ran = duoserve("pack", model_folder, "--quantize", "int8", "--text", tmp_path / "text")
    assert ran.code == 0
    packed, error, perplexity, bits = ran.out.splitlines()
    assert packed.startswith("packed: 24 experts, 96.00 KiB") and packed.endswith("-int8")
    assert re.fullmatch(r"int8: weights are off by 0\.\d{3}% \(root mean square\)", error)
    for line, name in ((perplexity, "perplexity"), (bits, "bits per byte")):
        before, after, change = map(
            float, re.fullmatch(rf"{name}: ([\d.]+) -> ([\d.]+) \(([+-][\d.]+)%\)", line).groups()
        )
        assert change == pytest.approx(100 * (after / before - 1), abs=1e-2) and before != after
    again = duoserve("pack", model_folder, "--quantize", "int8")
    assert again.out.startswith("already packed: 24 experts, 96.00 KiB") and len(again.out.splitlines()) == 1


def test_a_text_may_come_through_a_pipe(duoserve, model_folder, tmp_path):
    said = "To be, or not to bé,\r\nthat is the question"
    (tmp_path / "text").write_bytes(said.encode())
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[said.encode()], daemon=True)
    writer.start()
    piped, plain = (
        duoserve("pack", model_folder, "--quantize", "int8", "--text", tmp_path / name) for name in ("pipe", "text")
    )
    writer.join(60)
    assert piped.code == 0
    assert len(piped.out.splitlines()) == 4 and piped.out.splitlines()[2:] == plain.out.splitlines()[1:]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "text is empty"),
        (b"a", "1 tokens are no text that could be predicted: at least 2 are needed"),
        (b"caf\xe9 au lait", "text cannot be read as text in UTF-8"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused_before_anything_is_packed(duoserve, model_folder, tmp_path, data, why):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    (tmp_path / "text").write_bytes(data)
    ran = duoserve("pack", folder, "--quantize", "int8", "--text", tmp_path / "text")
    assert (ran.code, ran.out) == (1, "") and why in ran.err
    assert not (tmp_path / "cache").exists()


def test_a_text_without_quantization_is_refused(duoserve, model_folder, tmp_path):
    ran = duoserve("pack", model_folder, "--text", tmp_path / "text")
    assert (ran.code, ran.err.count("--text says what --quantize does to a text: give both")) == (1, 1)
    ran = duoserve("pack", model_folder, "--quantize", "int8", "--text", tmp_path / "text")
    assert ran.code == 1 and f"--text: {tmp_path / 'text'} cannot be read as text" in ran.err


def test_a_cache_that_cannot_be_looked_at_is_said(duoserve, model_folder, tmp_path):
    ran = duoserve("pack", model_folder, "--out", tmp_path / ("c" * 300))
    assert ran.code == 1 and "the pack cannot be written" in ran.err
