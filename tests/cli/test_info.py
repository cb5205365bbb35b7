"""``duoserve info``: its sums against the files, its table against the memory plan."""

import json

import pytest
from safetensors.torch import load_file

from duoserve.cli.inventory import what_fits
from tests.helpers.checkpoints import save_mixtral

EXPERT_ELEMENTS = 3 * 32 * 24


def test_every_byte_and_parameter_is_counted_once(duoserve, model_folder):
    report = json.loads(duoserve("info", model_folder, "--json").out)
    weights = model_folder / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    assert sum(report["bytes_by_part"].values()) == weights.stat().st_size - 8 - header == 4 * report["parameters"]
    assert report["bytes_by_part"]["experts"] == 24 * EXPERT_ELEMENTS * 4
    assert report["bytes_by_part"]["router"] == 3 * 8 * 32 * 4
    assert report["bytes_by_part"]["norms"] == (2 * 3 + 1) * 32 * 4
    assert report["bytes_by_part"]["embeddings"] == report["bytes_by_part"]["head"] == 291 * 32 * 4
    assert "other" not in report["bytes_by_part"]
    assert (report["total_experts"], report["active_experts"]) == (24, 6)
    assert report["parameters"] - report["active_parameters"] == 18 * EXPERT_ELEMENTS
    assert report["expert_bytes"] == EXPERT_ELEMENTS * 4 <= report["slot_bytes"] == 12288


def test_tables_for_people(duoserve, model_folder):
    ran = duoserve("info", model_folder)
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert (ran.code, ran.err) == (0, "")
    assert "model_type mixtral" in lines
    assert "dtype float32" in lines
    assert "experts: 24, 6 for a token, 9216 bytes each on disk, 12288 in a slot (12.00 KiB)" in lines
    assert "36.00 KiB 3 12.5%" in lines
    assert "288.00 KiB 24 100.0%" in lines
    assert any(line.startswith("total ") and line.endswith("100.0%") for line in lines)


def test_a_revision_stands_in_the_hub_id(duoserve, model_folder, monkeypatch):
    asked = []

    def download(name, *, revision, **options):
        asked.append((name, revision))
        return str(model_folder)

    monkeypatch.setattr("duoserve.experts.hub.snapshot_download", download)
    assert duoserve("info", "owner/name@refs/pr/3").code == 0
    assert asked == [("owner/name", "refs/pr/3")]


def test_no_weight_is_read(duoserve, model_folder, monkeypatch):
    def read(self, name, *args):
        raise AssertionError(f"read {name}")

    monkeypatch.setattr("duoserve.experts.checkpoint.Checkpoint.read_into", read)
    assert duoserve("info", model_folder).code == 0


def test_a_tied_head_is_not_counted(duoserve, tmp_path):
    report = json.loads(duoserve("info", save_mixtral(tmp_path, tie_word_embeddings=True), "--json").out)
    assert "head" not in report["bytes_by_part"]


@pytest.mark.parametrize(("slot_bytes", "total", "least"), [(12288, 24, 3), (4096, 48, 3), (4096, 3, 3), (4096, 4, 4)])
def test_what_fits_runs_from_the_least_to_all(slot_bytes, total, least):
    fits = what_fits(slot_bytes, total, least)
    assert (fits[0].slots, fits[-1].slots, fits[-1].share) == (least, total, 1.0)
    assert [fit.memory_bytes for fit in fits] == sorted({fit.memory_bytes for fit in fits})
    assert all(fit.slots == fit.memory_bytes // slot_bytes for fit in fits)


def test_a_folder_that_is_no_model_is_refused(duoserve, tmp_path):
    ran = duoserve("info", tmp_path)
    assert ran.code == 1
    assert ran.err.startswith(f"duoserve: error: {tmp_path}")


def test_an_index_is_enough(duoserve, model_folder, tmp_path):
    """The folder of a hub id without its weights: every figure is that of the whole checkpoint."""
    whole = json.loads(duoserve("info", model_folder, "--json").out)
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    from_config = json.loads(duoserve("info", tmp_path, "--json").out)
    names = list(load_file(model_folder / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    from_index = json.loads(duoserve("info", tmp_path, "--json").out)
    sources = [report.pop("source") for report in (whole, from_config, from_index)]
    assert sources == ["the weights' headers", "config.json", "model.safetensors.index.json"]
    assert whole == from_config == from_index


def test_an_index_of_another_model_is_refused(duoserve, model_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ran = duoserve("info", tmp_path)
    assert ran.code == 1
    assert "no file has what the model needs: 'lm_head.weight'" in ran.err
