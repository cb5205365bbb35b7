"""``duoserve train-predictor``."""

import json
from dataclasses import replace

import pytest

from duoserve.cli import train_predictor
from duoserve.predictors.files import load_predictor
from duoserve.traces.synthetic import CARDS, synthesize
from tests.traces.small import save_trace, small_trace


@pytest.fixture
def trace(tmp_path):
    made = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=2), 8, 20, 0.7, seed=0)
    save_trace(made, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_a_trace_becomes_a_predictor(duoserve, trace, tmp_path):
    out = tmp_path / "p.safetensors"
    ran = duoserve("train-predictor", trace, "--kind", "lookahead", "--out", out, "--json")
    assert ran.code == 0, ran.err
    figures, notes = json.loads(ran.out), json.loads(out.with_suffix(".json").read_text())
    assert figures["data"]["requests"] == 8 and len(figures["data"]["held_out_requests"]) == 1
    assert notes["held_out"]["recall"] == figures["held_out"]["recall"] and notes["kind"] == "lookahead"
    assert load_predictor(out, "synthetic:mixtral-8x7b").name == "lookahead"


def test_the_default_is_duoserves_own(duoserve, trace, tmp_path):
    ran = duoserve("train-predictor", trace, "--out", tmp_path / "p.safetensors", "--horizon", "2")
    assert ran.code == 0 and "duoserve" in ran.out and "recall@2" in ran.out
    assert load_predictor(tmp_path / "p.safetensors").horizon == 2


@pytest.mark.parametrize(
    ("out", "fault"),
    [
        ("p.bin", "must be named .safetensors"),
        ("no/p.safetensors", "cannot be written"),
        ("file/p.safetensors", "cannot be written"),
        ("folder.safetensors", "cannot be written"),
        ("its-json-is-one.safetensors", "cannot be written"),
    ],
)
def test_a_bad_name_is_refused_before_the_training(duoserve, trace, tmp_path, monkeypatch, out, fault):
    monkeypatch.setattr(train_predictor, "train", None)
    (tmp_path / "file").touch()
    for folder in ("folder.safetensors", "its-json-is-one.json"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.iterdir())
    ran = duoserve("train-predictor", trace, "--kind", "popularity", "--out", tmp_path / out)
    assert (ran.code, fault in ran.err) == (1, True)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["t.safetensors", "t.json"])
def test_the_trace_is_not_replaced_by_what_is_made_of_it(duoserve, trace, monkeypatch, name):
    monkeypatch.setattr(train_predictor, "train", None)
    monkeypatch.chdir(trace.parent)
    trace.rename(name)
    before = trace.with_name(name).read_bytes()
    ran = duoserve("train-predictor", trace.with_name(name), "--kind", "popularity", "--out", "t.safetensors")
    assert (ran.code, f"--out {name}: is the trace itself" in ran.err) == (1, True), ran.err
    assert trace.with_name(name).read_bytes() == before


def test_it_is_measured_on_requests_that_decode(duoserve, tmp_path):
    """They stand behind more than are measured, all of which are of a prompt alone."""
    prompts, others = [(2, 2)] * 300, [(4, 2)] * 5
    save_trace(small_trace(lengths=prompts + others), tmp_path / "t.safetensors", last=305)
    out = tmp_path / "p.safetensors"
    ran = duoserve("train-predictor", tmp_path / "t.safetensors", "--kind", "popularity", "--out", out)
    assert ran.code == 0, ran.err
    assert "on 5 requests held out" in ran.out
    assert json.loads(out.with_suffix(".json").read_text())["held_out"]["steps"] == 10


def test_a_seed_that_no_generator_takes_is_wrong_usage(duoserve, trace, tmp_path):
    ran = duoserve("train-predictor", trace, "--seed", "-5", "--out", tmp_path / "p.safetensors")
    assert (ran.code, "argument --seed: -5 is not an integer in 0.." in ran.err) == (2, True)


def test_a_trace_of_prompts_alone_is_refused_before_the_training(duoserve, tmp_path, monkeypatch):
    monkeypatch.setattr(train_predictor, "train", None)
    made = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=2), 4, 0, 0.7, seed=0, prompt=5)
    save_trace(made, tmp_path / "t.safetensors")
    ran = duoserve("train-predictor", tmp_path / "t.safetensors", "--out", tmp_path / "p.safetensors")
    assert ran.code == 1 and "has 4 requests, and none decodes" in ran.err


def test_no_trace(duoserve, tmp_path):
    (tmp_path / "t").write_bytes(b"12345678901234567890")
    ran = duoserve("train-predictor", tmp_path / "t", "--out", tmp_path / "p.safetensors")
    assert ran.code == 1 and "is no trace" in ran.err
