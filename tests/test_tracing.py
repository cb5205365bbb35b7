"""From prompts to a trace, and the command for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from duoserve import MoEModel
from duoserve.config import EngineConfig
from duoserve.engine import Engine
from duoserve.errors import RequestError, TraceError
from duoserve.predictors.training import train
from duoserve.traces.trace_file import FileRows, open_trace
from duoserve.tracing import RecordingSpec, record
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.listeners import Heard
from tests.helpers.toys import greedy
from tests.models.cases import FAMILIES

GREEDY = greedy(5)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_mixtral(tmp_path_factory.mktemp("traced"))


def run(folder, out, prompts=PROMPTS, **how):
    return record(folder, prompts, RecordingSpec(out, GREEDY, **how), EngineConfig(), "resident")


def test_the_tokens_and_what_they_were_routed_to(folder, tmp_path):
    trace = run(folder, tmp_path / "t")
    assert [request.num_prompt for request in trace] == [3, 2, 4]
    with MoEModel.from_pretrained(folder, policy="resident") as model:
        for request, prompt in zip(trace, PROMPTS, strict=True):
            assert request.token_ids_T.tolist() == prompt + model.generate(prompt, GREEDY).token_ids[:-1]
    request = trace[2]
    again = run(folder, tmp_path / "again", [request.token_ids_T.tolist()])[0]
    for layer in range(3):
        ours, theirs = request.layers[layer], again.layers[layer]
        np.testing.assert_array_equal(ours.topk_ids_NK, theirs.topk_ids_NK[:8])
        if layer:
            np.testing.assert_allclose(ours.ahead_NE, theirs.ahead_NE[:8], atol=1e-2)


def test_look_ahead_scores_stand_with_the_layer_that_they_are_about(folder, tmp_path):
    from duoserve.loading.load import load

    heard = Heard(lookahead=1)
    runtime = load(folder, EngineConfig(), "resident", None, heard)
    try:
        runtime.engine.forward(PROMPTS[0])
    finally:
        runtime.close()
    trace = run(folder, tmp_path / "t")
    for routing, told in zip(heard.routings[0], trace[0].routing(0), strict=True):
        np.testing.assert_array_equal(routing.topk_ids_TK, told.topk_ids_TK)
        for layer, scores_TE in routing.ahead.items():
            np.testing.assert_allclose(told.ahead[layer], scores_TE, rtol=1e-3, atol=1e-3)


def test_layers_without_experts_are_not_in_a_trace(tmp_path):
    """The first layer of a DeepSeek model is dense; a predictor that is trained on its trace serves it."""
    made = FAMILIES["deepseek_v2"].save(tmp_path / "model", "plain")
    trace = run(made, tmp_path / "t", PROMPTS * 3)
    assert trace.meta.layers == (1, 2)
    assert [routing.layer for routing in trace[0].routing(1)] == [1, 2] and list(trace[0].layers) == [1, 2]
    predictor, _ = train(trace, "duoserve")
    with MoEModel.from_pretrained(made, policy="resident") as model:
        tokens = model.generate(PROMPTS[0], GREEDY).token_ids
    with MoEModel.from_pretrained(
        made, policy="duoserve", predictor=predictor, expert_slots=6, cache_dir=tmp_path
    ) as model:
        assert model.generate(PROMPTS[0], GREEDY).token_ids == tokens
        assert model.stats.bytes.prefetched_useful + model.stats.bytes.prefetched_late + model.stats.bytes.wasted > 0


def test_an_interrupted_trace_keeps_whole_requests_and_is_resumed(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole")
    generate, served = Engine.generate, []

    def interrupted(engine, requests):
        served.append(requests)
        for produced in generate(engine, requests):
            if len(served) == 2:
                raise KeyboardInterrupt
            yield produced

    monkeypatch.setattr(Engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "t")
    assert len(open_trace(tmp_path / "t")) == 1
    trace = run(folder, tmp_path / "t", resume=True)
    assert len(served) == 4
    for name in whole.meta.columns():
        np.testing.assert_array_equal(trace.read(name), whole.read(name))


def test_a_trace_is_not_overwritten_but_added_to(folder, tmp_path):
    run(folder, tmp_path / "t", PROMPTS[:1])
    with pytest.raises(TraceError, match="exists; --resume finishes it"):
        run(folder, tmp_path / "t")
    assert [request.num_prompt for request in run(folder, tmp_path / "t", PROMPTS[1:], append=True)] == [3, 2, 4]


@pytest.mark.parametrize("how", ["resume", "append"])
@pytest.mark.parametrize(
    ("wanted", "params"),
    [
        (EngineConfig(quantize="int8"), GREEDY),
        (EngineConfig(dtype="bfloat16"), GREEDY),
        (EngineConfig(), replace(GREEDY, temperature=0.7)),
    ],
)
def test_what_was_made_otherwise_is_not_mixed(folder, tmp_path, how, wanted, params):
    """Of the same checkpoint, and so with the same fingerprint; lengths and seeds may differ."""
    run(folder, tmp_path / "t", PROMPTS[:1])
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(TraceError, match=r'recorded with \{"dtype": "float32".*record into another'):
        record(folder, PROMPTS[:2], RecordingSpec(tmp_path / "t", params, **{how: True}), wanted, "resident")
    assert (tmp_path / "t").read_bytes() == before
    longer = RecordingSpec(tmp_path / "t", replace(GREEDY, max_tokens=7, seed=3), append=True)
    assert len(record(folder, PROMPTS[1:], longer, EngineConfig(), "resident")) == 3


@pytest.mark.parametrize(("prompts", "fault"), [([[5, 6, 8]], "another prompt"), ([], "there are 0 prompts")])
def test_other_prompts_do_not_resume_a_trace(folder, tmp_path, prompts, fault):
    run(folder, tmp_path / "t", PROMPTS[:1])
    with pytest.raises(TraceError, match=fault):
        run(folder, tmp_path / "t", prompts, resume=True)


def test_prompts_are_compared_without_a_look_at_what_was_routed(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "t")
    read, names = FileRows.read, []
    monkeypatch.setattr(FileRows, "read", lambda rows, name, *span: names.append(name) or read(rows, name, *span))
    assert len(run(folder, tmp_path / "t", resume=True)) == 3
    assert set(names) == {"requests", "token_ids"}


def test_another_models_trace_is_left_alone(folder, tmp_path):
    other = save_mixtral(tmp_path / "other", num_hidden_layers=2)
    run(other, tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(TraceError, match="another model"):
        run(folder, tmp_path / "t", append=True)
    assert (tmp_path / "t").read_bytes() == before


def test_a_place_that_cannot_be_looked_at_is_no_place_for_a_trace(folder, tmp_path):
    with pytest.raises(TraceError, match="cannot be written"):
        run(folder, tmp_path / ("t" * 300))


def test_text_needs_a_tokenizer(folder, tmp_path):
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        run(folder, tmp_path / "t", ["text"])
    assert len(run(folder, tmp_path / "t")) == 3  # what has failed left nothing in the way


def test_all_prompts_are_checked_before_the_first_is_run(folder, tmp_path):
    with pytest.raises(RequestError, match="prompt 3: token id 99999 lies outside"):
        run(folder, tmp_path / "t", [*PROMPTS[:2], [99999]])
    assert not (tmp_path / "t").stat().st_size
