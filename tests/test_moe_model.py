"""The public face on a small checkpoint: what users call, what they are refused, and that the figures add up."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from duoserve import (
    CheckpointError,
    ClosedError,
    ConfigError,
    MemoryBudgetError,
    MoEModel,
    RequestError,
)
from duoserve.config import Phase
from duoserve.errors import TraceError
from duoserve.request import Request
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fake_hub import FakeHub
from tests.helpers.live_threads import threads_since
from tests.helpers.small_tokenizers import byte_level_tokenizer
from tests.helpers.toys import greedy

PROMPT = [5, 9, 2, 40, 41, 7]
GREEDY = greedy(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained(folder, expert_slots="25%", cache_dir=tmp_path) as model:
        yield model


def test_a_revision_is_what_the_hub_is_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(folder, tmp_path / "snapshot", monkeypatch)
    with MoEModel.from_pretrained("owner/name", revision="v1", expert_slots="25%", cache_dir=tmp_path) as model:
        assert model.generate(PROMPT, GREEDY).token_ids
    assert set(hub.asked) == {("owner/name", "v1")}
    with pytest.raises(CheckpointError, match=r"revision is 'v1', but .* is no hub id"):
        MoEModel.from_pretrained(str(folder), revision="v1")


def test_stats_count_every_expert_and_every_byte(model: MoEModel) -> None:
    stats = model.generate(PROMPT, GREEDY).stats
    assert (stats.prompt_tokens, stats.output_tokens, len(stats.itl_s)) == (6, 8, 7)
    decode = stats.hits[Phase.DECODE] + stats.misses[Phase.DECODE]
    assert decode == 7 * 3 * 2  # steps x layers x top-k
    assert stats.misses[Phase.DECODE] > 0 and stats.hits[Phase.DECODE] > 0
    assert stats.bytes.demanded >= stats.misses[Phase.DECODE] * model.memory.slot_bytes
    assert stats.bytes.total % model.memory.slot_bytes == 0


def test_a_list_gives_what_each_prompt_gives_alone(model: MoEModel) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[::-1]]
    together = model.generate(prompts, GREEDY)
    assert [done.token_ids for done in together] == [model.generate(p, GREEDY).token_ids for p in prompts]
    assert model.generate([], GREEDY) == []


def test_more_prompts_than_the_kv_cache_holds_run_in_turns(folder: Path) -> None:
    with MoEModel.from_pretrained(folder, max_context=128) as model:
        done = model.generate([PROMPT] * 5, greedy(50))
    assert [len(d.token_ids) for d in done] == [50] * 5 and len({tuple(d.token_ids) for d in done}) == 1


def test_seeded_sampling_repeats_and_depends_on_the_seed(model: MoEModel) -> None:
    def draw(seed: int) -> list[int]:
        return model.generate(PROMPT, max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_end_of_text_token_stops(model: MoEModel) -> None:
    free = model.generate(PROMPT, max_tokens=30, temperature=1.0, seed=21, ignore_eos=True)
    held = model.generate(PROMPT, max_tokens=30, temperature=1.0, seed=21)
    assert len(free.token_ids) == 30 and 1 in free.token_ids[1:-1]
    assert held.token_ids == free.token_ids[: free.token_ids.index(1) + 1]
    assert held.finish_reason == "stop"


def test_generation_config_says_which_tokens_end_a_text(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    with MoEModel.from_pretrained(folder) as model:
        third = model.generate(PROMPT, GREEDY).token_ids[2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, third]}))
    with MoEModel.from_pretrained(folder) as model:
        done = model.generate(PROMPT, GREEDY, ignore_eos=False)
    assert done.finish_reason == "stop" and done.token_ids[-1] == third and len(done.token_ids) <= 3


def test_an_end_token_is_no_text_though_the_tokenizer_does_not_call_it_special(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    with MoEModel.from_pretrained(folder) as model:
        free = model.generate(PROMPT, GREEDY)
    assert free.token_ids[3] not in free.token_ids[:3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": free.token_ids[3]}))
    with MoEModel.from_pretrained(folder) as model:
        done = model.generate(PROMPT, GREEDY, ignore_eos=False)
        assert (done.token_ids, done.finish_reason) == (free.token_ids[:4], "stop")
        assert model.tokenizer is not None and done.text == model.tokenizer.decode(free.token_ids[:3])
        assert "".join(model.stream(PROMPT, GREEDY, ignore_eos=False)) == done.text
        assert model.generate(PROMPT, GREEDY).text == free.text  # one that is ignored is text


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([[]], {}, "the prompt is empty"),
        ([96], {}, r"token id 96 lies outside the vocabulary, 0\.\.95"),
        ([-1], {}, "token id -1"),
        ([1] * 300, {}, r"300 prompt tokens and max_tokens=8 exceed the 256 positions that the model knows"),
        ([1], {"max_tokens": 500}, "lower max_tokens"),
        ("To be", {}, "no tokenizer.json: give token ids"),
        ([1], {"stop": ("x",)}, "stop strings need a tokenizer"),
        ([1], {"temperatur": 1.0}, "unknown sampling parameter 'temperatur'"),
        ([1], {"ignore_eos": "no"}, "ignore_eos is 'no', but must be True or False"),
        ([1.7], {}, r"text or token ids, and not 1\.7"),
        ([1, 1.7], {}, r"text or token ids, and not \[1, 1\.7\]"),
        ([[1], 5], {}, "text or token ids, and not 5"),
        (b"To be", {}, "text or token ids, and not b'To be'"),
        (None, {}, "text or token ids, and not None"),
        ({"prompt": [1]}, {}, "text or token ids"),
    ],
)
def test_bad_requests_are_refused_and_the_next_one_runs(
    model: MoEModel, prompt: list[int] | str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate(prompt, GREEDY, **changes)
    assert len(model.generate(PROMPT, GREEDY).token_ids) == 8


def test_parameters_of_another_kind_are_refused(model: MoEModel) -> None:
    with pytest.raises(RequestError, match="params is 8, but must be SamplingParams"):
        model.generate(PROMPT, 8)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_token_ids_come_in_any_sequence_of_integers(model: MoEModel, kind: Callable[[list[int]], Any]) -> None:
    assert model.generate(kind(PROMPT), GREEDY).token_ids == model.generate(PROMPT, GREEDY).token_ids
    two = model.generate(kind([PROMPT, PROMPT[::-1]]), GREEDY)
    assert [done.token_ids for done in two] == [model.generate(p, GREEDY).token_ids for p in (PROMPT, PROMPT[::-1])]
    assert model.forward(kind(PROMPT)).equal(model.forward(PROMPT))


def test_stream_without_a_tokenizer_says_so(model: MoEModel) -> None:
    with pytest.raises(RequestError, match="use generate"):
        model.stream(PROMPT)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"expert_slots": 2}, MemoryBudgetError, "3"),
        ({"expert_slots": "0%"}, ConfigError, "expert_slots"),
        ({"expert_slots": 4, "memory": "1GiB"}, ConfigError, "expert_slots and memory exclude each other"),
        ({"expert_memory": "9 lightyears"}, ConfigError, "not an amount of memory"),
        ({"policy": "clairvoyant"}, ConfigError, "lru"),
        ({"policy": "resident", "expert_slots": 6}, MemoryBudgetError, "24"),
        ({"device": "abacus"}, ConfigError, "abacus"),
        ({"dtype": "int3"}, ConfigError, "float16"),
        ({"max_context": 0}, ConfigError, "max_context is 0"),
        ({"copy_threads": 0}, ConfigError, "copy_threads"),
        ({"max_context": 2.5}, ConfigError, r"max_context is 2\.5, but must be an integer"),
        ({"max_context": "4k"}, ConfigError, "max_context is '4k'"),
        ({"max_context": True}, ConfigError, "max_context is True"),
        ({"copy_threads": None}, ConfigError, "copy_threads is None"),
        ({"invariant": "no"}, ConfigError, "invariant is 'no', but must be True or False"),
        ({"device": None}, ConfigError, "device is None, but must be text"),
        ({"dtype": []}, ConfigError, "dtype is \\[\\], but must be text"),
        ({"predictor": 3}, ConfigError, "predictor is 3"),
        ({"predictor": ""}, TraceError, "cannot be read as a predictor"),
    ],
)
def test_bad_options_are_refused(
    folder: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MoEModel.from_pretrained(folder, **options)


def test_memory_bounds_everything(folder: Path, tmp_path: Path) -> None:
    with MoEModel.from_pretrained(folder, memory="70MiB", max_context=64, cache_dir=tmp_path) as model:
        assert model.memory.total_bytes <= 70 << 20
        assert model.memory.num_slots == 24  # all of this small model fits
    with pytest.raises(MemoryBudgetError, match="raise memory"):
        MoEModel.from_pretrained(folder, memory="1MiB")


def test_after_close_everything_is_refused_and_released(folder: Path, tmp_path: Path) -> None:
    threads = threads_since()
    model = MoEModel.from_pretrained(folder, expert_slots=6, cache_dir=tmp_path)
    model.generate(PROMPT, GREEDY)
    assert threads() > 0
    slots = weakref.ref(model._runtime.engine._passes._model.layers[0].ffn.weights.w13_SNH)
    model.close()
    model.close()
    gc.collect()
    assert threads() == 0 and slots() is None
    with pytest.raises(ClosedError, match="was closed"):
        model.generate(PROMPT, GREEDY)


def test_threads_take_turns(model: MoEModel) -> None:
    alone = model.generate(PROMPT, GREEDY).token_ids
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(model.generate(PROMPT, GREEDY).token_ids)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 4


def test_who_waits_while_a_service_is_made_is_refused_but_served_if_that_fails(folder: Path) -> None:
    def asked() -> None:
        try:
            found.append(model.generate(PROMPT, GREEDY).token_ids)
        except RequestError as error:
            found.append(str(error))

    def lent(error: Exception | None) -> object:
        """What two hear who ask for text while the model is lent, which then succeeds or fails."""
        waiting = [threading.Thread(target=asked, daemon=True) for _ in range(2)]
        with suppress(KeyError), model.lend():
            for thread in waiting:
                thread.start()
            waiting[0].join(0.2)
            assert all(thread.is_alive() for thread in waiting)
            if error is not None:
                raise error
        for thread in waiting:
            thread.join(10)
        return [found.pop(), found.pop()]

    found: list[object] = []
    with MoEModel.from_pretrained(folder) as model:
        alone = model.generate(PROMPT, GREEDY).token_ids
        assert lent(KeyError("no service")) == [alone] * 2
        assert lent(None) == ["a service runs this model: submit requests to it"] * 2


def test_compute_and_stall_add_up_to_the_wall_time(tmp_path: Path) -> None:
    """Wide enough that wake-ups of threads are small; compute has timers of its own, so that a gap would show."""
    wide = save_mixtral(tmp_path / "wide", hidden_size=256, intermediate_size=1024, head_dim=64)
    asleep = []
    with MoEModel.from_pretrained(wide, expert_slots="25%", cache_dir=tmp_path) as model:
        model.generate(PROMPT, GREEDY)
        for _ in range(5):
            stats = model.generate(PROMPT * 8, GREEDY, max_tokens=30).stats
            assert stats.compute_s + stats.stall_s == pytest.approx(stats.wall_s, rel=0.05)
            assert 0 < stats.overlap_s <= min(stats.compute_s, stats.transfer_s)
            assert stats.ttft_s is not None and stats.tpot_s is not None
            assert stats.ttft_s + sum(stats.itl_s) == pytest.approx(stats.wall_s, rel=0.05)
            lanes_s = stats.compute_s + stats.transfer_s - stats.overlap_s
            asleep.append((stats.wall_s - lanes_s) / stats.wall_s)
    # The copy lane ends when the bytes are there; the waiting thread still has to be woken, once a stall. On a busy
    # machine that may take long, but hardly five times in turn.
    assert min(asleep) == pytest.approx(0.0, abs=0.1)


def test_a_slow_reader_of_a_stream_costs_no_wall_time(model: MoEModel) -> None:
    requests = [Request(PROMPT, GREEDY)]
    engine = model._runtime.engine
    began = time.perf_counter()
    for _ in engine.generate(requests):
        time.sleep(0.02)
    elapsed = time.perf_counter() - began
    assert elapsed - model.stats.wall_s >= 0.9 * 8 * 0.02
    assert max(model.stats.itl_s) < elapsed - 8 * 0.02
