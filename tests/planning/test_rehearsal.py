"""Rehearsals: what is measured, of which models, and that nothing of it stays behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duoserve.byte_sizes import parse_bytes
from duoserve.planning import rehearsal
from duoserve.planning.formats import layout_in
from duoserve.planning.made_up import PassNotes
from duoserve.planning.model_cards import find_model
from duoserve.planning.rehearsal import Rehearsal, TimedPass, layers_to_rehearse, prompt_times, rehearse, step_times

GIB = 1 << 30


def took(seconds: float, asked_s: list[float], missing: list[int], copies: float = 0.0) -> TimedPass:
    return TimedPass(seconds, PassNotes(asked_s, missing), copies)


def test_a_layer_lasts_from_its_call_to_the_next_and_all_else_is_the_rest() -> None:
    """Layers of 1, 3 and 5 s by what is missing, and 2 s beside them; no step missed one only."""
    steps = [took(1 + 5 + 1 + 2, [0, 1, 6], [0, 2, 0]), took(5 + 1 + 5 + 2, [0, 5, 6], [2, 0, 2])]
    layer_s, rest_s = step_times([steps], keeps=True)
    assert (layer_s, rest_s) == (pytest.approx((1.0, 3.0, 5.0)), pytest.approx(2.0))


def test_where_nothing_is_kept_the_number_that_is_missing_does_not_count() -> None:
    assert step_times([[took(10.0, [0, 2, 6], [2, 1, 2])]], keeps=False) == ((3.0,), 1.0)


def test_what_is_slow_now_and_then_counts_and_what_is_slow_once_does_not() -> None:
    """In each request one layer of twenty takes 21 s instead of 1, in one of them another takes 1000 s."""
    usual = [took(45.0, [*range(20), 40], [1] * 21)]
    hiccup = [took(1044.0, [0, *range(1000, 1019), 1039], [1] * 21)]
    layer_s, rest_s = step_times([usual, usual, hiccup, usual, usual], keeps=False)
    assert (layer_s, rest_s) == (pytest.approx((2.0,)), pytest.approx(3.0))


def test_prompts_are_told_apart_by_what_is_copied() -> None:
    many, few = [took(8.0, [1, 3, 5], [1, 1, 1], 3.0)], [took(14.0, [1, 5, 9], [2, 2, 2], 18.0)]
    assert prompt_times([many, few]) == ((1.0, 6.0), (2.0, 4.0), 2.0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("STEPS", 6), ("PROMPTS", 1), ("MOST_PROMPTS", 1), ("LAYERS", 2)):
        monkeypatch.setattr(rehearsal, name, few)


def test_what_takes_little_time_is_done_more_often(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def passes(run: object, prompt: int, steps: int) -> list[TimedPass]:
        asked.append(prompt)
        return [took(1.0, [0.0], [0])]

    monkeypatch.setattr(rehearsal, "timed_passes", passes)
    for most, enough_s, count in ((5, 60.0, 5), (5, 0.0, 2)):
        for name, value in (("PROMPTS", 2), ("MOST_PROMPTS", most), ("ENOUGH_S", enough_s)):
            monkeypatch.setattr(rehearsal, name, value)
        asked.clear()
        assert len(rehearsal.timed_requests(None, 16)) == count
        assert asked == [16] * (1 + count)


def test_every_way_is_measured_and_nothing_is_left(short: None, tmp_path: Path) -> None:
    model = find_model("bard")
    found = rehearse(model, layout_in(model.config, None, model.config.dtype), 16, tmp_path)
    assert found is not None
    assert {(policy, tier) for policy, tiers in found.times.items() for tier in tiers} == set(rehearsal.WAYS)
    for policy, tiers in found.times.items():
        for decode, prefill in tiers.values():
            assert all(0 < seconds < 5 for seconds in (*decode.layer_s, *prefill.layer_s))
            assert len(decode.layer_s) == (3 if policy in ("duoserve", "lru") else 1)
            assert prefill.copies == tuple(sorted(prefill.copies))
    assert found.times["on-demand"]["ram"].prefill.copies == (8.0,)
    assert found.times["resident"]["disk"].prefill.copies == (0.0,)
    assert list(tmp_path.iterdir()) == []
    assert Rehearsal.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_long_prompt_is_cut_short(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "MAX_PROMPT", 8)
    model = find_model("bard")
    found = rehearse(model, layout_in(model.config, None, model.config.dtype), 1000, tmp_path, [("resident", "disk")])
    assert found is not None and found.prompt == 8


def test_a_short_context_has_room_for_the_prompt_and_the_steps_behind_it(short: None, tmp_path: Path) -> None:
    """6 steps behind the prompt and the token that it gives; a model without that room is not rehearsed."""
    model = find_model("bard")
    layout = layout_in(model.config, None, model.config.dtype)
    for positions, prompt in ((12, 5), (9, 2), (8, None)):
        config = replace(model.config, max_position_embeddings=positions)
        found = rehearse(replace(model, config=config), layout, 16, tmp_path, [("resident", "disk")])
        assert (found and found.prompt) == prompt


def test_a_prompt_of_one_token_is_rehearsed_as_one_of_two(short: None, tmp_path: Path) -> None:
    """A single token is what a decode step has: its choice would be one that asks for any number of missing experts."""
    model = find_model("bard")
    found = rehearse(model, layout_in(model.config, None, model.config.dtype), 1, tmp_path, [("on-demand", "ram")])
    assert found is not None and found.prompt == 2
    (copied,) = found.times["on-demand"]["ram"].prefill.copies
    assert copied > model.config.top_k


@pytest.mark.parametrize(
    ("name", "free", "layers"),
    [
        ("bard", "1GiB", 4),
        ("bard", "40MiB", 3),
        ("bard", "16MiB", 0),
        ("mixtral-8x7b", "4096GiB", 0),
        ("deepseek-v2-lite", "64GiB", 0),
        ("gpt-oss-20b", "64GiB", 2),
    ],
)
def test_small_layers_are_rehearsed(name: str, free: str, layers: int) -> None:
    model = find_model(name)
    layout = layout_in(model.config, None, model.config.dtype)
    assert layers_to_rehearse(model, layout, parse_bytes(free)) == layers


def test_a_model_that_is_too_large_is_not_rehearsed(tmp_path: Path) -> None:
    model = find_model("mixtral-8x7b")
    assert rehearse(model, layout_in(model.config, None, model.config.dtype), 16, tmp_path) is None
