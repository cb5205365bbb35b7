"""Predictors in files."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from duoserve.config import EngineConfig, Phase
from duoserve.errors import TraceError
from duoserve.experts.hub import EMBEDDED_FOLDER
from duoserve.predictors.files import load_predictor, notes_path, save_predictor
from duoserve.predictors.quality import measure
from duoserve.predictors.training import KINDS
from duoserve.sampling import SamplingParams
from duoserve.tracing import RecordingSpec, record


def predictions(predictor, trace):
    found = []
    for step in range(4):
        routings = list(trace[0].routing(step))
        predictor.begin(Phase.DECODE if step else Phase.PREFILL, routings[0].requests_T)
        for routing in routings:
            found.append(predictor.predict(routing.layer))
            predictor.observe(routing)
    return np.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_predicts_as_what_was_saved(trace, trained, tmp_path, kind):
    predictor, _ = trained[kind]
    path = tmp_path / "p.safetensors"
    save_predictor(predictor, path, {"data": {"requests": 16}})
    loaded = load_predictor(path, predictor.meta.fingerprint)
    assert (loaded.name, loaded.horizon, loaded.meta) == (kind, predictor.horizon, predictor.meta)
    np.testing.assert_array_equal(predictions(loaded, trace), predictions(deepcopy(predictor), trace))
    assert json.loads(notes_path(path).read_text())["data"] == {"requests": 16}


def test_another_models_predictor_is_refused(trained, tmp_path):
    save_predictor(trained["popularity"][0], tmp_path / "p.safetensors", {})
    with pytest.raises(TraceError, match=r"of another model \(fingerprint synthetic:mixtra, this model's is b\)"):
        load_predictor(tmp_path / "p.safetensors", "b")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_predictor_with_a_wrong_array_is_refused(trained, tmp_path, kind, fault):
    path = tmp_path / "p.safetensors"
    save_predictor(trained[kind][0], path, {})
    arrays = safetensors.numpy.load(path.read_bytes())
    name = sorted(name for name in arrays if name != "scale_1")[0]
    if fault == "missing":
        del arrays[name]
    else:
        arrays[name] = np.zeros([size + 1 for size in arrays[name].shape], dtype=np.float32)
    path.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(TraceError, match="is not a whole predictor"):
        load_predictor(path)


def change_arrays(path, change):
    arrays = safetensors.numpy.load(path.read_bytes())
    change(arrays)
    path.write_bytes(safetensors.numpy.save(arrays))


@pytest.mark.parametrize("name", ["inner_XH", "inner_bias_H", "outer_HE"])
def test_hidden_layers_of_different_widths_are_refused(trained, tmp_path, name):
    path = tmp_path / "p.safetensors"
    save_predictor(trained["duoserve"][0], path, {})
    axis = name.rpartition("_")[2].index("H")
    half = np.s_[:, :32] if axis else np.s_[:32]
    change_arrays(path, lambda arrays: arrays.update({f"1.2.{name}": arrays[f"1.2.{name}"][half].copy()}))
    with pytest.raises(TraceError, match=r"1\.2\.\*_H have different widths \[32, 64\]"):
        load_predictor(path)


def test_a_name_that_claims_to_look_far_ahead_is_refused(trained, tmp_path):
    path = tmp_path / "p.safetensors"
    save_predictor(trained["duoserve"][0], path, {})
    change_arrays(path, lambda arrays: arrays.update({"0.1000000000.direct_FE": arrays.pop("0.3.direct_FE")}))
    with pytest.raises(TraceError, match=r"0\.3\.direct_FE"):
        load_predictor(path)


def test_no_matrices_at_all_are_refused(trained, tmp_path):
    path = tmp_path / "p.safetensors"
    save_predictor(trained["activation-matrix"][0], path, {})
    change_arrays(path, lambda arrays: arrays.update(matrices_MLE=arrays["matrices_MLE"][:0].copy()))
    with pytest.raises(TraceError, match="has the shape"):
        load_predictor(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_arrays_that_are_not_finite_are_refused(trained, tmp_path, kind, value):
    path = tmp_path / "p.safetensors"
    save_predictor(trained[kind][0], path, {})
    whole = path.read_bytes()
    last_of_a_sort = {name.rpartition(".")[2]: name for name in safetensors.numpy.load(whole)}
    for name in last_of_a_sort.values():
        path.write_bytes(whole)
        change_arrays(path, lambda arrays: np.put(arrays[name], 0, value))  # noqa: B023 - called at once
        with pytest.raises(TraceError, match=f"is not a whole predictor .*{name} has values that are not finite"):
            load_predictor(path)


@pytest.mark.parametrize("name", ["num_experts", "top_k", "layers"])
def test_notes_with_a_number_beyond_all_floats_are_refused(trained, tmp_path, name):
    path = tmp_path / "p.safetensors"
    save_predictor(trained["affinity"][0], path, {})
    about = json.loads(notes_path(path).read_text())
    endless = json.dumps(about | {name: "1e999"}).replace('"1e999"', "[1e999]" if name == "layers" else "1e999")
    notes_path(path).write_text(endless)
    with pytest.raises(TraceError, match="is not of this version"):
        load_predictor(path)


@pytest.mark.parametrize(("dtype", "nbytes"), [("BF16", 2), ("F8_E4M3", 1)])
def test_numbers_that_numpy_does_not_have_are_refused(trained, tmp_path, dtype, nbytes):
    path = tmp_path / "p.safetensors"
    save_predictor(trained["popularity"][0], path, {})
    header = json.dumps({"popularity_LE": {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, 32 * nbytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32 * nbytes))
    with pytest.raises(TraceError, match="cannot be read as a predictor"):
        load_predictor(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "x"}, "not of this version"),
        ({"kind": "magic"}, "magic"),
        ({"kind": "duoserve"}, "not a whole predictor"),
        ({"num_experts": 9}, "has the shape"),
        ({"layers": []}, "0 layers"),
        ({"top_k": 0}, "top-0 of 8 experts"),
        ({"top_k": 9}, "top-9 of 8 experts"),
    ],
)
def test_notes_that_do_not_fit_are_refused(trained, tmp_path, change, fault):
    path = tmp_path / "p.safetensors"
    save_predictor(trained["affinity"][0], path, {})
    about = json.loads(notes_path(path).read_text())
    notes_path(path).write_text(json.dumps(about | change))
    with pytest.raises(TraceError, match=fault):
        load_predictor(path)


@pytest.mark.parametrize(("model", "least_recall"), [("bard", 0.75), ("bard-fine", 0.7)])
def test_the_embedded_ones_come_with_their_own(tmp_path, model, least_recall):
    """It is the model's by the fingerprint, and predicts what it does with a line that nothing was trained on."""
    recording = RecordingSpec(tmp_path / "t", SamplingParams(max_tokens=60, temperature=1.0, seed=0))
    trace = record(model, ["What beast was't, then, That made you break this"], recording, EngineConfig(), "resident")
    shipped = EMBEDDED_FOLDER / model / "predictor.safetensors"
    predictor = load_predictor(shipped, trace.meta.fingerprint)
    recall = measure(predictor, trace, [0]).recall(trace.meta.top_k)
    assert (predictor.name, predictor.horizon) == ("duoserve", 3)
    assert recall > least_recall


@pytest.mark.parametrize("cut", [0, 8, 200])
def test_a_file_cut_short_or_missing_is_refused(trained, tmp_path, cut):
    path = tmp_path / "p.safetensors"
    with pytest.raises(TraceError, match="cannot be read as a predictor"):
        load_predictor(path)
    save_predictor(trained["popularity"][0], path, {})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TraceError, match="cannot be read as a predictor"):
        load_predictor(path)


def test_a_full_disk_leaves_the_predictor_that_was_there(trained, tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "p.safetensors", Path.write_bytes
    save_predictor(trained["popularity"][0], path, {"of": "before"})

    def breaks_off(target, data):
        write_bytes(target, data[:8])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", breaks_off)
    with pytest.raises(TraceError, match="No space left"):
        save_predictor(trained["popularity"][0], path, {"of": "after"})
    assert load_predictor(path).name == "popularity"


def test_arrays_beside_the_notes_of_others_are_refused(trained, tmp_path, monkeypatch):
    """Of the two files the second cannot be written."""
    path, written = tmp_path / "p.safetensors", []
    save_predictor(trained["popularity"][0], path, {})
    other = deepcopy(trained["popularity"][0])
    other.popularity_LE = other.popularity_LE[:, ::-1].copy()
    write_bytes = Path.write_bytes

    def breaks_off(target, data):
        written.append(target)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return write_bytes(target, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", breaks_off)
        with pytest.raises(TraceError, match="No space left"):
            save_predictor(other, path, {})
    with pytest.raises(TraceError, match=r"p\.safetensors: is not what p\.json is about; train it again"):
        load_predictor(path)
    save_predictor(other, path, {})
    np.testing.assert_array_equal(load_predictor(path).popularity_LE, other.popularity_LE)


def test_a_predictor_of_an_earlier_version_whose_notes_name_no_arrays_is_read(trained, tmp_path):
    path = tmp_path / "p.safetensors"
    save_predictor(trained["popularity"][0], path, {})
    about = json.loads(notes_path(path).read_text())
    del about["arrays"]
    notes_path(path).write_text(json.dumps(about))
    assert load_predictor(path).name == "popularity"
