"""Checkpoints: reads what transformers saves, bit for bit; refuses what is malformed or does not belong together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from duoserve.errors import CheckpointError, ClosedError
from duoserve.experts import checkpoint as checkpoint_module
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.hub import EMBEDDED, EMBEDDED_FOLDER
from duoserve.models.registry import family_of
from tests.experts.safetensors_files import SINGLE, single_file, write_bytes_tensors
from tests.helpers.checkpoints import save_mixtral

ROPE_TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("saved")
    return {
        "single": save_mixtral(made / "single", dtype=torch.bfloat16),
        "sharded": save_mixtral(made / "sharded", dtype=torch.float16, shard="40KB", intermediate_size=11),
        "tied": save_mixtral(made / "tied", tie_word_embeddings=True),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return single_file(tmp_path)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the safetensors library reads."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def expected_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    family = family_of(checkpoint.config)
    return family.tensor_shapes(family.parse_config(checkpoint.config))


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
def test_reads_every_tensor_bit_for_bit(saved: dict[str, Path], kind: str) -> None:
    checkpoint = Checkpoint.open(saved[kind])
    theirs = all_tensors(saved[kind])
    assert checkpoint.tensors.keys() == theirs.keys()
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in theirs.items())
    checkpoint.close()


def test_the_sharded_fixture_has_shards(saved: dict[str, Path]) -> None:
    assert len(list(saved["sharded"].glob("*.safetensors"))) > 2


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
def test_a_checkpoint_of_transformers_passes_the_check(saved: dict[str, Path], kind: str) -> None:
    checkpoint = Checkpoint.open(saved[kind])
    checkpoint.check(expected_shapes(checkpoint))
    assert expected_shapes(checkpoint).keys() == checkpoint.tensors.keys()
    checkpoint.close()


@pytest.mark.parametrize("elements", [1, 31, 32, 33, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_convert_and_scatter(
    saved: dict[str, Path], dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_STAGE_ELEMENTS", elements)
    checkpoint = Checkpoint.open(saved["sharded"])
    for name, theirs in all_tensors(saved["sharded"]).items():
        assert same_bits(checkpoint.read(name, dtype), theirs.to(dtype))
        wide = torch.full((*theirs.shape, 2), 7.0, dtype=dtype)
        checkpoint.read_into(name, wide[..., 1])
        assert torch.equal(wide[..., 1], theirs.to(dtype))
        assert (wide[..., 0] == 7.0).all()
    checkpoint.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_long_rows_go_where_they_belong(folder: Path, dtype: torch.dtype) -> None:
    """As gate and up rows do, in turn."""
    made = torch.randn(9, 700).to(dtype)
    save_file({"x": made}, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    turns = torch.full((9, 2, 700), 7.0, dtype=dtype)
    checkpoint.read_into("x", turns[:, 1])
    assert torch.equal(turns[:, 1], made) and (turns[:, 0] == 7.0).all()
    checkpoint.close()


def test_reads_scalars_and_empty_tensors(folder: Path) -> None:
    made = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "flat": torch.empty(3, 0)}
    save_file(made, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    for name, tensor in made.items():
        assert same_bits(checkpoint.read(name), tensor)
        assert same_bits(checkpoint.read(name, torch.float16), tensor.half())
    checkpoint.close()


def test_reading_into_another_shape_names_both(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"tensor 'x' has shape \[4\], but \[2, 2\] is needed"):
        checkpoint.read_into("x", torch.empty(2, 2, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="has no tensor 'z'"):
        checkpoint.read("z")
    checkpoint.close()


def resave(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Checkpoint:
    """``source`` with its tensors changed in place by ``change``, opened."""
    shutil.copytree(source, folder)
    tensors = all_tensors(source)
    change(tensors)
    save_file(tensors, folder / SINGLE)
    return Checkpoint.open(folder)


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(EXPERT), f"no file has what the model needs: '{EXPERT}'; .*download"),
    "four missing": (
        lambda t: [t.pop(EXPERT.replace("3", str(expert))) for expert in range(4)],
        r"experts.0.w2.weight', .*experts.1.w2.weight', .*experts.2.w2.weight' and 1 more; ",
    ),
    "missing head": (lambda t: t.pop("lm_head.weight"), "what the model needs: 'lm_head.weight'"),
    "extra": (
        lambda t: t.update({"model.bias": torch.ones(3)}),
        r"model\.safetensors'?: the model has no place for 'model\.bias'; .*download",
    ),
    "mis-shaped": (
        lambda t: t.update({EXPERT: torch.ones(24, 32)}),
        rf"model\.safetensors: tensor '{EXPERT}' has shape \[24, 32\], but config.json makes it \[32, 24\]; .*download",
    ),
    "integers": (
        lambda t: t.update({EXPERT: torch.ones(32, 24, dtype=torch.int8)}),
        rf"tensor '{EXPERT}' has dtype torch.int8; supported are bfloat16, float16, float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_fit_the_model_are_refused(saved: dict[str, Path], tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    checkpoint = resave(saved["single"], tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.check(expected_shapes(checkpoint))
    assert str(tmp_path / "changed") in str(caught.value)
    checkpoint.close()


def test_old_rope_tables_and_a_tied_head_are_ignored(saved: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = resave(
        saved["tied"],
        tmp_path / "changed",
        lambda t: t.update({ROPE_TABLE: torch.ones(4), "lm_head.weight": torch.ones(2)}),
    )
    checkpoint.check(expected_shapes(checkpoint))
    with pytest.raises(CheckpointError, match=r"no place for 'lm_head\.weight'"):
        checkpoint.check(expected_shapes(checkpoint), ignorable=lambda name: name.endswith("inv_freq"))
    checkpoint.close()


CONFIGS: dict[str, tuple[bytes, str]] = {
    "not an object": (b"[]", "holds a JSON list where an object is needed"),
    "a key twice": (b'{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' stands 2 times"),
    "a key twice inside": (b'{"rope": {"a": 1, "a": 2}}', "the key 'a' stands 2 times"),
    "not JSON": (b"{", "not valid JSON"),
    "too deep": (b'{"a":' * 100_000, "not valid JSON"),
    "too large": (b" " * (1 << 20) + b"{}", "1048578 bytes, more than the 1048576"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_malformed_config_is_refused(folder: Path, case: str) -> None:
    content, message = CONFIGS[case]
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        Checkpoint.open(folder)


def test_a_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        Checkpoint.open(folder)


def test_reading_after_close_is_an_error(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ClosedError, match="read after close"):
        checkpoint.read("x")


def fingerprint(folder: Path) -> str:
    checkpoint = Checkpoint.open(folder)
    try:
        return checkpoint.fingerprint()
    finally:
        checkpoint.close()


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-6}))


def change_weights(folder: Path) -> None:
    write_bytes_tensors(folder / SINGLE, x=b"abcx")


def change_names(folder: Path) -> None:
    write_bytes_tensors(folder / SINGLE, y=b"abcd")


@pytest.mark.parametrize("change", [change_config, change_weights, change_names])
def test_the_fingerprint_tells_checkpoints_apart(folder: Path, change: Callable[[Path], None]) -> None:
    first = fingerprint(folder)
    assert len(first) == 64 and fingerprint(folder) == first
    change(folder)
    assert fingerprint(folder) != first


@pytest.mark.parametrize("shape", [(8, 64, 64), (8, 4, 16, 64)])
def test_the_fingerprint_knows_each_entry_of_a_fused_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = []
    for changed in (None, *range(8)):
        tensor = torch.zeros(shape)
        if changed is not None:
            tensor[changed] = 1
        save_file({"x": tensor}, tmp_path / SINGLE)
        first.append(fingerprint(tmp_path))
    assert len(set(first)) == 9


def test_a_tensor_of_countless_empty_entries_is_one_sample(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 60, 0, 1], "data_offsets": [0, 0]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    assert len(fingerprint(tmp_path)) == 64


def test_all_samples_of_a_shard_are_asked_for_before_the_first_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a disk brings them side by side. Nothing is asked for an empty tensor: that would be the whole file."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(4096), "b": torch.zeros(2, 3, 3), "c": torch.zeros(0)}, tmp_path / SINGLE)
    calls: list[tuple[str, int, int]] = []
    fadvise, preadv = os.posix_fadvise, os.preadv

    def advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append(("advise", offset, nbytes))
        fadvise(fd, offset, nbytes, advice)

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(("read", offset, len(buffers[0])))
        return preadv(fd, buffers, offset)

    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(os, "preadv", read)
    checkpoint.fingerprint()
    checkpoint.close()
    assert [kind for kind, *_ in calls] == ["advise"] * 3 + ["read"] * 3
    assert [place for _, *place in calls[:3]] == [place for _, *place in calls[3:]]


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_fingerprints_of_the_embedded_models_are_those_that_their_predictors_name(name: str) -> None:
    named = json.loads((EMBEDDED_FOLDER / name / "predictor.json").read_text())["fingerprint"]
    assert fingerprint(EMBEDDED_FOLDER / name) == named


def test_the_fingerprint_moves_with_its_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    assert fingerprint(copy) == fingerprint(folder)
