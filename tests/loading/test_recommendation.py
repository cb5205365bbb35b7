"""What evaluate found best: written, found again, and used by "auto"."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from duoserve import MoEModel
from duoserve.errors import CheckpointError, TraceError
from duoserve.evaluating import evaluate
from duoserve.experts.checkpoint import Checkpoint
from duoserve.loading.recommendation import (
    PREDICTOR_FILE,
    RECOMMENDATION_FILE,
    Recommendation,
    find_recommendation,
    predictor_beside,
    save_recommendation,
)
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.files import load_predictor, notes_path, save_predictor
from duoserve.predictors.training import train
from duoserve.replaying.bake_off import BOUNDS, figures
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from duoserve.replaying.replay import Replay
from duoserve.traces.synthetic import RoutingCard, synthesize
from duoserve.traces.trace import Trace, TraceMeta
from tests.helpers.checkpoints import BARD, save_mixtral
from tests.traces.drawn import drawn_trace

SIZES = LayerSizes("small", 1_000_000, 8, 1_000_000, 64)
LIKE_THE_CHECKPOINT = RoutingCard("three-layers", 8, 2, 3, 0.5, 1.5, 0.6, 0.9, 0.3, 0.6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_mixtral(tmp_path / "model")


def trace_for(checkpoint: Checkpoint) -> Trace:
    made = synthesize(LIKE_THE_CHECKPOINT, requests=4, tokens=20, precision=0.8, seed=1, prompt=5)
    meta = TraceMeta(checkpoint.fingerprint(), made.meta.layers, 8, 2)
    return Trace(meta, made._rows)


def test_a_recommendation_beside_the_model_is_what_auto_does(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    predictor, _ = train(trace_for(checkpoint), "lookahead")
    best = Recommendation("lookahead", True, "it is best")
    where = save_recommendation(checkpoint, best, predictor, {"rows": []}, tmp_path / "c")
    assert where == folder
    assert find_recommendation(checkpoint) == (best, folder)
    checkpoint.close()
    with MoEModel.from_pretrained(folder, expert_slots=6, cache_dir=tmp_path / "c") as model:
        assert model.policy == "lookahead"
        model.generate([1, 2, 3], max_tokens=8, ignore_eos=True)
        assert model.stats.bytes.prefetched_useful + model.stats.bytes.prefetched_late + model.stats.bytes.wasted > 0
    with MoEModel.from_pretrained(folder, expert_slots=24, cache_dir=tmp_path / "c") as model:
        assert model.policy == "resident"


def test_a_recommendation_without_prefetch_makes_no_guesses(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    save_recommendation(checkpoint, Recommendation("lookahead", False, ""), None, {})
    checkpoint.close()
    assert not (folder / PREDICTOR_FILE).exists()
    with MoEModel.from_pretrained(folder, expert_slots=6, cache_dir=tmp_path / "c") as model:
        model.generate([1, 2, 3], max_tokens=8, ignore_eos=True)
        assert model.stats.bytes.total == model.stats.bytes.demanded > 0


def test_a_read_only_models_recommendation_goes_to_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(folder)
    monkeypatch.setattr("duoserve.loading.recommendation.os.access", lambda path, mode: False)
    where = save_recommendation(checkpoint, Recommendation("lru", False, ""), None, {}, tmp_path / "cache")
    assert where.is_relative_to(tmp_path / "cache") and not (folder / RECOMMENDATION_FILE).exists()
    assert find_recommendation(checkpoint, tmp_path / "cache") == (Recommendation("lru", False, ""), where)
    assert find_recommendation(checkpoint, tmp_path / "elsewhere") is None
    checkpoint.close()


def test_a_read_only_models_older_recommendation_gives_way_to_the_one_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(folder)
    save_recommendation(checkpoint, Recommendation("lru", False, ""), None, {}, tmp_path / "c")
    monkeypatch.setattr("duoserve.loading.recommendation.os.access", lambda path, mode: False)
    assert find_recommendation(checkpoint, tmp_path / "c") == (Recommendation("lru", False, ""), folder)
    where = save_recommendation(checkpoint, Recommendation("on-demand", False, ""), None, {}, tmp_path / "c")
    assert where != folder and find_recommendation(checkpoint, tmp_path / "c") == (
        Recommendation("on-demand", False, ""),
        where,
    )
    checkpoint.close()
    with MoEModel.from_pretrained(folder, expert_slots=6, cache_dir=tmp_path / "c") as model:
        assert model.policy == "on-demand"


def test_the_predictor_of_a_recommendation_is_the_one_that_was_written_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another lies beside the model, which has become writable again."""
    checkpoint = Checkpoint.open(folder)
    chosen, other = (train(trace_for(checkpoint), kind)[0] for kind in ("lookahead", "popularity"))
    with monkeypatch.context() as read_only:
        read_only.setattr("duoserve.loading.recommendation.os.access", lambda path, mode: False)
        save_recommendation(checkpoint, Recommendation("lookahead", True, ""), chosen, {}, tmp_path / "c")
    save_predictor(other, folder / PREDICTOR_FILE, {})
    fetched, heard = [], []
    monkeypatch.setattr(
        "duoserve.loading.recommendation.load_predictor",
        lambda path, of: fetched.append(path) or load_predictor(path, of),
    )
    checkpoint.close()
    for told in (None, "auto"):
        with MoEModel.from_pretrained(folder, expert_slots=6, predictor=told, cache_dir=tmp_path / "c"):
            heard.append(fetched[-1].parent == folder)
    assert heard == [False, True]


def test_a_recommendation_of_many_replays_is_found_again(folder: Path) -> None:
    """A long list of slot counts: what is written must not be more than is read."""
    row = figures(Replay("duoserve", "lookahead", 1000, ttft_s=[1 / 3], itl_s=[1 / 3]), dict.fromkeys(BOUNDS, 1 / 3))
    best = Recommendation("lru", False, "")
    with closing(Checkpoint.open(folder)) as checkpoint:
        save_recommendation(checkpoint, best, None, {"rows": [row] * 2000})
        assert find_recommendation(checkpoint) == (best, folder)


def test_what_came_with_the_package_stays_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOSERVE_CACHE", str(tmp_path / "default"))
    checkpoint = Checkpoint.open(BARD)
    shipped = {path.name: path.stat().st_mtime_ns for path in BARD.iterdir()}
    predictor, _ = train(trace_for(checkpoint), "popularity")
    best = Recommendation("duoserve", True, "")
    where = save_recommendation(checkpoint, best, predictor, {}, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in BARD.iterdir()} == shipped
    assert where.is_relative_to(tmp_path) and find_recommendation(checkpoint, tmp_path) == (best, where)
    chosen, others = predictor_beside(checkpoint, tmp_path), predictor_beside(checkpoint, tmp_path / "elsewhere")
    assert chosen is not None and chosen.name == "popularity"
    assert others is not None and others.name == "duoserve"
    checkpoint.close()


def test_what_evaluate_wrote_to_the_default_cache_is_found_behind_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOSERVE_CACHE", str(tmp_path / "a"))
    with closing(Checkpoint.open(BARD)) as checkpoint:
        save_recommendation(checkpoint, Recommendation("lru", False, ""), None, {})
        with MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=tmp_path / "b") as model:
            assert model.policy == "lru"
        where = save_recommendation(checkpoint, Recommendation("on-demand", False, ""), None, {}, tmp_path / "b")
        assert find_recommendation(checkpoint, tmp_path / "b") == (Recommendation("on-demand", False, ""), where)


def test_a_recommendation_that_cannot_be_written_leaves_the_one_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(folder)
    save_recommendation(checkpoint, Recommendation("lru", False, ""), None, {}, tmp_path)

    def breaks_off(path: Path, data: str | bytes) -> None:
        path.open("w").write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", breaks_off)
    monkeypatch.setattr(Path, "write_bytes", breaks_off)
    with pytest.raises(TraceError, match="No space left"):
        save_recommendation(checkpoint, Recommendation("duoserve", False, ""), None, {}, tmp_path)
    assert find_recommendation(checkpoint, tmp_path) == (Recommendation("lru", False, ""), folder)
    checkpoint.close()


def test_another_models_recommendation_is_passed_over_and_a_broken_one_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    path = folder / RECOMMENDATION_FILE
    path.write_text(json.dumps({"fingerprint": "another", "policy": "lru", "predictor": False}))
    assert find_recommendation(checkpoint, tmp_path) is None
    for policy in ("mru", ["lru"], {}, None):
        path.write_text(json.dumps({"fingerprint": checkpoint.fingerprint(), "policy": policy, "predictor": False}))
        with pytest.raises(TraceError, match=re.escape(f"{policy!r}, which is not known")):
            find_recommendation(checkpoint)
    path.write_text("{")
    with pytest.raises(TraceError, match="run duoserve evaluate again"):
        find_recommendation(checkpoint)
    checkpoint.close()
    with (
        pytest.warns(UserWarning, match="run duoserve evaluate again") as said,
        MoEModel.from_pretrained(folder, expert_slots=6, cache_dir=tmp_path / "c") as model,
    ):
        assert model.policy == "duoserve"
    assert are_of_this_file(said)


def are_of_this_file(said: Iterable[warnings.WarningMessage]) -> bool:
    """Whether warnings name the line that called the package, and none within it."""
    return {one.filename for one in said} == {__file__}


def of_another_version(path: Path) -> None:
    notes_path(path).write_text(notes_path(path).read_text().replace("duoserve predictor 1", "duoserve predictor 0"))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: notes_path(path).unlink(), of_another_version])
def test_a_recommendation_whose_predictor_cannot_be_read_makes_no_guesses(
    damage: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    with closing(Checkpoint.open(folder)) as checkpoint:
        save_recommendation(
            checkpoint, Recommendation("lookahead", True, ""), train(trace_for(checkpoint), "lookahead")[0], {}
        )
    damage(folder / PREDICTOR_FILE)
    with (
        pytest.warns(UserWarning, match="makes no guesses without .*run duoserve evaluate again") as said,
        MoEModel.from_pretrained(folder, expert_slots=6, cache_dir=tmp_path / "c") as model,
    ):
        model.generate([1, 2, 3], max_tokens=8, ignore_eos=True)
        assert model.policy == "lookahead" and model.stats.bytes.total == model.stats.bytes.demanded > 0
    assert are_of_this_file(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with MoEModel.from_pretrained(folder, expert_slots=24) as model:
            assert model.policy == "resident"
        for slots in (6, 24):
            with pytest.raises(TraceError, match="predictor"):
                MoEModel.from_pretrained(folder, predictor=folder / PREDICTOR_FILE, expert_slots=slots)


@pytest.mark.parametrize("policy", ["auto", "lru"])
def test_a_cache_that_cannot_be_looked_at_is_said(folder: Path, tmp_path: Path, policy: str) -> None:
    with pytest.raises(CheckpointError, match=r"the pack cannot be written .*DUOSERVE_CACHE"):
        MoEModel.from_pretrained(folder, policy=policy, expert_slots=6, host_memory=0, cache_dir=tmp_path / ("c" * 300))


def test_a_predictor_is_given_as_a_file_or_found_beside_the_model(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    predictor, _ = train(trace_for(checkpoint), "lookahead")
    assert predictor_beside(checkpoint, tmp_path) is None
    save_predictor(predictor, tmp_path / "p.safetensors", {})
    save_predictor(predictor, folder / PREDICTOR_FILE, {})
    checkpoint.close()
    for told in ("auto", tmp_path / "p.safetensors", str(tmp_path / "p.safetensors"), predictor):
        with MoEModel.from_pretrained(
            folder, policy="lookahead", predictor=told, expert_slots=6, cache_dir=tmp_path / "c"
        ) as model:
            model.generate([1, 2, 3], max_tokens=8, ignore_eos=True)
            assert model.stats.bytes.total > model.stats.bytes.demanded


def trained_beside(folder: Path, best: Recommendation) -> RowPredictor:
    """A predictor of the model that nobody has saved, beside a recommendation without one."""
    with closing(Checkpoint.open(folder)) as checkpoint:
        save_recommendation(checkpoint, best, None, {})
        return train(trace_for(checkpoint), "lookahead")[0]


def test_a_predictor_that_is_asked_for_is_heard_where_it_was_found_not_to_pay(folder: Path, tmp_path: Path) -> None:
    predictor = trained_beside(folder, Recommendation("lookahead", False, ""))
    with MoEModel.from_pretrained(folder, predictor=predictor, expert_slots=6, cache_dir=tmp_path / "c") as model:
        model.generate([1, 2, 3], max_tokens=8, ignore_eos=True)
        assert model.stats.bytes.total > model.stats.bytes.demanded


def test_a_predictor_that_nobody_will_hear_is_said(folder: Path, tmp_path: Path) -> None:
    predictor = trained_beside(folder, Recommendation("lru", False, ""))
    for told, words in (
        (predictor, "'lru', which duoserve evaluate recommends"),
        ("auto", "found none beside the model"),
    ):
        with pytest.warns(UserWarning, match=words) as said:
            MoEModel.from_pretrained(folder, predictor=told, expert_slots=6, cache_dir=tmp_path / "c").close()
        assert are_of_this_file(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"policy": "lru", "predictor": predictor}, {"predictor": "auto"}):
            slots = 6 if "policy" in options else 24  # where all fit nobody needs one
            MoEModel.from_pretrained(folder, expert_slots=slots, cache_dir=tmp_path / "c", **options).close()


def test_a_predictor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    predictor, _ = train(drawn_trace(requests=4), "lookahead")
    save_predictor(predictor, tmp_path / "p.safetensors", {})
    for told, name in ((tmp_path / "p.safetensors", "p.safetensors"), (predictor, "predictor='lookahead'")):
        with pytest.raises(TraceError, match=f"{name}: is the predictor of another model"):
            MoEModel.from_pretrained(folder, predictor=told, expert_slots=6, cache_dir=tmp_path)
    assert not (tmp_path / "packs").exists()


def test_a_predictor_that_claims_other_layers_than_the_models_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its fingerprint is the model's: it would fail within the first request."""
    with closing(Checkpoint.open(folder)) as checkpoint:
        predictor, _ = train(trace_for(checkpoint), "lookahead")
        predictor.meta = replace(predictor.meta, layers=(0, 1, 3))
        save_recommendation(checkpoint, Recommendation("lookahead", True, ""), predictor, {})
    for told in (folder / PREDICTOR_FILE, predictor):
        with pytest.raises(TraceError, match=r"is the predictor of top-2 of 8 experts in layers \[0, 1, 3\]"):
            MoEModel.from_pretrained(folder, predictor=told, expert_slots=6, cache_dir=tmp_path)
    with (
        pytest.warns(UserWarning, match=r"makes no guesses without .* in layers \[0, 1, 3\]"),
        MoEModel.from_pretrained(folder, expert_slots=6, cache_dir=tmp_path) as model,
    ):
        assert model.policy == "lookahead"
        assert model.generate([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids


class TestEvaluate:
    def test_prefetch_stays_where_the_link_is_idle_and_goes_where_it_never_is(self) -> None:
        trace = drawn_trace(requests=8, tokens=40, precision=0.95)
        idle = Machine(Hardware("idle", 1e10, 1e11, 1e14, 0.0, 5e-4), SIZES)
        busy = Machine(Hardware("busy", 1e8, 1e11, 1e14, 0.0, 1e-6), SIZES)
        pays, not_ = (evaluate(trace, machine, [24]) for machine in (idle, busy))
        assert pays.recommendation.use_predictor and pays.predictor is not None
        assert "prefetch is on" in pays.recommendation.why
        assert not not_.recommendation.use_predictor and not_.predictor is None
        assert {row["policy"] for row in pays.rows} >= {"lru", "on-demand", "duoserve", "oracle"}

    def test_whoever_has_as_many_slots_has_the_same_bounds(self) -> None:
        trace = drawn_trace(requests=8, tokens=40, precision=0.95)
        done = evaluate(trace, Machine(Hardware("idle", 1e10, 1e11, 1e14, 0.0, 5e-4), SIZES), [24, 48])
        rows = {count: [row for row in done.rows if row["slots"] == count] for count in (24, 48)}
        assert len(rows[24]) == len(rows[48]) == 7  # one of them without guesses
        for bound in ("least_bytes_per_token", "layer_belady_bytes_per_token"):
            few, many = ({row[bound] for row in rows[count]} for count in (24, 48))
            assert len(few) == len(many) == 1 and few.pop() > many.pop() > 0

    def test_a_model_of_one_layer(self) -> None:
        trace = synthesize(replace(LIKE_THE_CHECKPOINT, num_layers=1), requests=4, tokens=20, precision=0.8, seed=1)
        done = evaluate(trace, Machine(Hardware("idle", 1e10, 1e11, 1e14, 0.0, 5e-4), SIZES), [4])
        assert not done.recommendation.use_predictor and len({row["policy"] for row in done.rows}) == 6

    def test_prompts_alone_are_nothing_to_choose_by(self) -> None:
        prompts = synthesize(LIKE_THE_CHECKPOINT, requests=4, tokens=0, precision=0.8, seed=1, prompt=5)
        with pytest.raises(TraceError, match="the trace has 4 requests, and none decodes"):
            evaluate(prompts, Machine(Hardware("made up", 1e9, 1e12, 1e15), SIZES), [6])

    def test_it_judges_by_requests_that_no_predictor_was_trained_on(self) -> None:
        trace = drawn_trace(requests=8, tokens=10)
        _, held = train(trace, "lookahead")
        some = trace.select(held)
        assert len(some) == len(held) < len(trace)
        for at, number in enumerate(held):
            for layer in trace.meta.layers:
                here, there = some[at].layers[layer], trace[number].layers[layer]
                assert (here.topk_ids_NK == there.topk_ids_NK).all()
                assert layer == 0 or (here.ahead_NE == there.ahead_NE).all()
