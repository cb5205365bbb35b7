"""Training: what it sees is what the engine will show, what is held out stays unseen, and it pays."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from duoserve.config import Phase
from duoserve.errors import IntegrityError, TraceError
from duoserve.predictors import training
from duoserve.predictors.examples import Tokens, affinity, popularity
from duoserve.predictors.features import margins
from duoserve.predictors.files import save_predictor
from duoserve.predictors.learned import DIRECT, PATH_INPUTS
from duoserve.predictors.networks import LayerModule, Recipe, fit, held_out_loss
from duoserve.predictors.paper import paper_inputs
from duoserve.predictors.quality import measure
from duoserve.predictors.training import KINDS, train
from duoserve.traces.synthetic import CARDS, synthesize
from duoserve.traces.trace import LayerTrace
from tests.traces.drawn import trace_of


def quick_train(trace, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LAYER_RECIPE", replace(training.LAYER_RECIPE, epochs=2))
        patch.setattr(training, "PAPER_RECIPE", replace(training.PAPER_RECIPE, epochs=2, width=16))
        return train(trace, kind)


def arrays_of(predictor):
    """By name, as its file has them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.safetensors"
        save_predictor(predictor, path, {})
        return load_file(path)


def replayed(predictor, request):
    """The passes of a request, each layer's routing with a chance to look first."""
    for step in range(request.num_steps):
        routings = list(request.routing(step))
        predictor.begin(Phase.DECODE if step else Phase.PREFILL, routings[0].requests_T)
        for routing in routings:
            yield step, routing
            predictor.observe(routing)


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_examples_are_what_a_history_shows_in_decode(trace, trained, distance):
    """Before each layer of request 5, which are rows 63 to 125 of the examples, 3 of them its prompt."""
    predictor = trained["duoserve"][0]
    history, tokens = predictor.history, Tokens(trace, [2, 5])
    examples, paths = [tokens.examples(place, distance) for place in range(4)], list(tokens.whole_paths())
    compared = 0
    for step, routing in replayed(predictor, trace[5]):
        later, place = divmod(history.place[routing.layer] + distance - 1, 4)
        row = 63 + 3 + step + later - 1
        if step == 0 or row > 125:
            continue
        one = examples[place]
        counts_TDE, totals_TD1 = history.counts(trace.meta.layers[place])
        pairs = [(history.path[back], one.seen.path[back]) for back in range(PATH_INPUTS)]
        pairs += [(counts_TDE, one.seen.counts_TDE), (totals_TD1, one.seen.totals_TD1)]
        pairs += [(history.whole_path_TE, paths[place])] if distance == 1 else []
        pairs += [(scores_TE, one.seen.scores_TE) for scores_TE in history.ahead.values()]
        for shown_TX, taught_NX in pairs:
            np.testing.assert_allclose(shown_TX[0], taught_NX[row], rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared > 1100


def test_the_first_token_of_a_request_has_no_past(trace):
    tokens = Tokens(trace, [3, 8])
    for place, distance in [(0, 1), (2, 1), (1, 2)]:
        one = tokens.examples(place, distance)
        first = one.seen.counts_TDE[[0, 63]], one.seen.totals_TD1[[0, 63]]
        assert not any(values.any() for values in first) and one.seen.counts_TDE[62].any()
        assert one.seen.path[0][[0, 63]].any() == (place >= distance)
    assert tokens.examples(0, 1).seen.scores_TE is None


def test_counting_by_hand():
    trace = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=2), 2, 9, 0.6, seed=1)
    tokens = Tokens(trace, [0, 1])
    ids = [trace.layer(layer).topk_ids_NK for layer in (0, 1)]
    assert popularity(tokens)[1, 3] == pytest.approx((ids[1] == 3).any(1).mean())
    one = tokens.examples(1, 1)
    table = affinity(one.seen.path[0], one.chosen_NE)
    was, came = (ids[0] == 2).any(1), (ids[1] == 5).any(1)
    assert table[2, 5] == pytest.approx(((was & came).sum() + 2 * came.mean()) / (was.sum() + 2), rel=1e-5)


def test_a_margin_is_the_way_to_the_border():
    scores = np.array([[1.0, 5.0, 2.0, 4.0]], dtype=np.float32)
    assert margins(scores, 2).tolist() == [[-2.0, 2.0, -1.0, 1.0]]
    assert margins(scores, 4).tolist() == [[0.0, 4.0, 1.0, 3.0]]


def test_the_papers_inputs():
    got = paper_inputs(np.array([[0.0, 2.0, 1.0]]), np.array([0.1, 0.4, 0.2]), np.array([[0.0, 0.0, 3.0]]))
    np.testing.assert_allclose(got, [[0, 1, 0.5, 0.25, 1, 0.5, 0, 0, 1]])


def test_training_never_sees_the_requests_held_out(trace, trained):
    """Another routing of the held-out requests changes no table that is counted, and no network."""
    _, held = trained["affinity"]
    tensors = {name: trace.read(name).copy() for name in trace.meta.columns()}
    for number in held:
        tensors["topk_ids.2"][trace.starts_R[number] : trace.starts_R[number + 1]] = [0, 1]
    changed = type(trace)(trace.meta, type(trace._rows)(tensors))
    for kind in KINDS:
        ours, theirs = (arrays_of(quick_train(one, kind)[0]) for one in (changed, trace))
        assert ours.keys() == theirs.keys() != set(), kind
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=f"{kind} {name}")
    assert 0 < len(held) < 4


def test_requests_of_one_prompt_stay_together(trace):
    """Eight prompts, each run twice: what is held out of them was never trained on."""
    twice = trace.select([*range(8), *range(8)])
    for seed in range(3):
        predictor, held = train(twice, "popularity", seed=seed)
        assert sorted({number % 8 for number in held}) == sorted(number % 8 for number in held if number < 8)
        assert len(held) == 2 and predictor.trained_on.isdisjoint(twice.prompt_marks[number] for number in held)
        assert len(predictor.trained_on) == 7


def peak_bytes(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_one_long_request_among_many_takes_no_more_memory_than_its_tokens():
    short, long = ([(1, [[0, 1]] * length)] for length in (2, 3000))
    tokens = Tokens(trace_of(short * 400 + long, num_experts=64), range(401))
    assert peak_bytes(lambda: tokens.examples(0, 1)) < 40 * len(tokens) * 64 * 4


def test_the_papers_perceptron_is_given_no_more_than_it_draws(monkeypatch):
    """All examples of the 16 layers would be 110 MB."""
    trace = synthesize(replace(CARDS["deepseek-v2-lite"], num_layers=16), 4, 1500, 0.6, seed=0)
    recipe = replace(training.PAPER_RECIPE, width=8, epochs=1, epoch_rows=1600)
    monkeypatch.setattr(training, "PAPER_RECIPE", recipe)
    assert peak_bytes(lambda: train(trace, "paper")) < 60e6


def test_every_kind_is_better_than_chance_and_ours_is_the_best(trace, trained):
    recall = {kind: measure(predictor, trace, held).recall(2) for kind, (predictor, held) in trained.items()}
    assert all(value > 0.28 for value in recall.values()), recall  # chance is 0.25
    assert recall["duoserve"] > max(recall[kind] for kind in KINDS if kind != "duoserve"), recall


def test_chances_are_calibrated(trace, trained):
    for kind in ("popularity", "lookahead", "duoserve"):
        predictor, held = trained[kind]
        assert measure(predictor, trace, held).calibration_error < 0.06, kind


def test_a_second_replay_knows_nothing_of_the_first(trace, trained):
    for kind, (predictor, held) in trained.items():
        first, second = (measure(predictor, trace, held).to_dict() for _ in range(2))
        assert first == second, kind


def test_further_ahead_is_harder_but_better_than_popularity(trace, trained):
    predictor, held = trained["duoserve"]
    right = {distance: [] for distance in (1, 2, 3)}
    for number in held:
        asked = {}
        for step, routing in replayed(predictor, trace[number]):
            place = predictor.history.place[routing.layer]
            for distance in (1, 2, 3):
                target = place + distance - 1
                if target < 4:
                    asked[step, trace.meta.layers[target], distance] = predictor.predict(trace.meta.layers[target])
                chances_E = asked.get((step, routing.layer, distance))
                if chances_E is not None and step:
                    best = np.argsort(-chances_E)[:2]
                    right[distance].append(np.isin(routing.topk_ids_TK[0], best).mean())
    recalls = [np.mean(right[distance]) for distance in (1, 2, 3)]
    assert recalls[0] > recalls[1] > 0.3 and recalls[2] > 0.3, recalls


def test_beyond_the_horizon(trace, trained):
    predictor = trained["lookahead"][0]
    predictor.begin(Phase.DECODE, np.array([0]))
    predictor.observe(next(iter(trace[0].routing(1))))
    with pytest.raises(IntegrityError, match="asked 2 layers ahead, its horizon is 1"):
        predictor.predict(2)


def test_rows_of_a_step_are_joined(trace, trained):
    """A step of two requests wants what either wants."""
    for kind, (predictor, _) in trained.items():
        alone = []
        one, two = (next(iter(trace[number].routing(1))) for number in (1, 2))
        for routing in (one, two):
            predictor.begin(Phase.DECODE, routing.requests_T + 1000)
            predictor.observe(routing._replace(requests_T=routing.requests_T + 1000))
            alone.append(predictor.predict(1))
        joined = [np.concatenate([getattr(r, n) for r in (one, two)]) for n in one._fields[1:4]]
        ahead = {layer: np.concatenate([one.ahead[layer], two.ahead[layer]]) for layer in one.ahead}
        predictor.begin(Phase.DECODE, joined[0] + 2000)
        predictor.observe(type(one)(0, joined[0] + 2000, joined[1], joined[2], ahead))
        got = predictor.predict(1)
        np.testing.assert_allclose(got, 1 - (1 - alone[0]) * (1 - alone[1]), rtol=1e-4, atol=1e-6, err_msg=kind)
        assert got.dtype == np.float32 and got.shape == (8,), kind


def test_a_network_keeps_its_best_state_on_what_is_held_out():
    """Noise is learned by heart, which is worse than to know nothing."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 28).numpy(), torch.rand(64, 4).round().numpy()
    train_data, held_out_data = (x[:32], y[:32]), (x[32:], y[32:])
    recipe = Recipe(64, epochs=60, patience=5, learning_rate=1e-2, weight_decay=0.0, batch=16, epoch_rows=64)
    module = LayerModule(28, 4, 64, torch.zeros(DIRECT), torch.zeros(4))
    before = held_out_loss(module, held_out_data, F.binary_cross_entropy_with_logits)
    fitted = fit(module, train_data, held_out_data, recipe)
    after = held_out_loss(fitted, held_out_data, F.binary_cross_entropy_with_logits)
    assert after <= before


def test_look_ahead_scores_that_say_nothing_have_no_weight():
    """As of a router that makes the same of every hidden state."""
    trace = trace_of([(1, [[0, 1], [2, 3], [0, 2]])] * 3, layers=2)
    predictor, _ = train(trace, "lookahead")
    assert predictor.slopes_L[1] == pytest.approx(0, abs=1e-6) and np.isfinite(predictor.offsets_L).all()


def test_one_request_is_not_enough(trace):
    lonely = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=2), 1, 5, 0.6, seed=0)
    for same in (lonely, lonely.select([0, 0])):
        found = f"has {len(same)} requests of 1 different prompts, but training holds some out"
        with pytest.raises(TraceError, match=found):
            train(same, "popularity")


@pytest.mark.parametrize("seed", range(4))
def test_what_decodes_is_held_out_first(seed):
    """One request of six does, and is what the figures are of."""
    course = [[0, 1], [2, 3]]
    trace = trace_of([(1 if number == 3 else 2, course) for number in range(6)])
    predictor, held = train(trace, "popularity", seed=seed)
    assert held == [3] and measure(predictor, trace, held).to_dict()["steps"] == 1


def test_prompts_alone_are_nothing_to_measure_on():
    prompts = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=2), 4, 0, 0.6, seed=0, prompt=5)
    predictor, held = train(prompts, "popularity")
    with pytest.raises(TraceError, match="1 requests are held out to measure on, and none decodes"):
        measure(predictor, prompts, held)


def test_figures_are_json(trace, trained):
    predictor, held = trained["popularity"]
    figures = json.loads(json.dumps(measure(predictor, trace, held).to_dict()))
    assert figures["steps"] == 60 * len(held) and list(figures["recall"]) == ["2", "3", "4", "6"]


def test_quality_counts_what_came():
    class Sure:
        name, horizon, lookahead = "sure", 1, 0

        def begin(self, phase, requests_T): ...

        def observe(self, routing): ...

        def predict(self, layer):
            return np.array([0.9, 0.8, 0.7, 0, 0, 0, 0, 0], dtype=np.float32)

    trace = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=1), 1, 30, 0.6, seed=0)
    ids = trace.layer(0).topk_ids_NK[1:]
    quality = measure(Sure(), trace, [0])
    assert quality.recall(2) == pytest.approx((ids < 2).mean()) and quality.recall(3) == pytest.approx((ids < 3).mean())
    assert quality.exact() == pytest.approx((ids < 2).all(1).mean())
    assert quality.at_least_half() == pytest.approx((ids < 2).any(1).mean())
    came = np.array([(ids == e).any(1).mean() for e in range(8)])
    want = abs(0.9 - came[0]) + abs(0.8 - came[1]) + abs(0.7 - came[2]) + came[3:].sum()
    assert quality.calibration_error == pytest.approx(want / 8, abs=1e-6)
    assert isinstance(trace.layer(0), LayerTrace)
