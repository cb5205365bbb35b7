"""llama.cpp's worker on a fake xllamacpp, the limit of memory that it shares with ours, and Belady's fewest misses."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpu import least_bytes, memory_cap
from tests.helpers.checkpoints import save_mixtral

BENCH = Path(__file__).resolve().parents[2] / "bench"
VOCAB = 96


class FakeServer:
    """Chooses its prompt's length after a millisecond, and has the log-probability -id for every token."""

    missing = 0  # tokens that a stream does not give

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    def handle_completions(
        self, asked: dict[str, Any], on_chunk: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any] | None:
        assert asked["temperature"] == 0.0 and asked["ignore_eos"]
        if on_chunk is None:
            ids = reversed(range(asked["logprobs"]))
            said = {"top_logprobs": [{"id": token, "logprob": -float(token)} for token in ids]}
            assert asked["n_predict"] == 1 and asked["cache_prompt"]
            return {"choices": [{"text": " 0", "logprobs": {"content": [said]}}]}
        assert asked["stream"] and not asked["cache_prompt"]
        for step in range(asked["n_predict"] - self.missing):
            time.sleep(1e-3)
            assert on_chunk({"choices": [{"text": f" {len(asked['prompt']) + step}"}]}) is False
        on_chunk({"choices": [{"text": "", "finish_reason": "length"}]})
        return None


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The worker's module, on the fake."""
    modes = SimpleNamespace(LLAMA_LOAD_MODE_MMAP="mapped", LLAMA_LOAD_MODE_NONE="read")

    def parameters() -> SimpleNamespace:
        parts = {name: SimpleNamespace() for name in ("model", "cpuparams", "cpuparams_batch")}
        return SimpleNamespace(**parts)

    fake = SimpleNamespace(Server=FakeServer, CommonParams=parameters, llama_load_mode=modes)
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    monkeypatch.delitem(sys.modules, "cpu.llama_peer", raising=False)
    yield importlib.import_module("cpu.llama_peer")
    sys.modules.pop("cpu.llama_peer")


@pytest.fixture
def loaded(llama: Any, tmp_path: Path) -> Any:
    checkpoint = save_mixtral(tmp_path / "mixtral", dtype=torch.bfloat16, intermediate_size=64)
    worker = llama.LlamaCpp()
    worker.load(str(checkpoint), gguf=str(tmp_path / "w.gguf"), kind="bf16", max_context=64)
    return worker


def test_a_model_is_loaded_as_the_others_are(loaded: Any, tmp_path: Path) -> None:
    parameters = loaded._server.parameters
    assert (tmp_path / "w.gguf").read_bytes()[:4] == b"GGUF"
    assert parameters.model.path == str(tmp_path / "w.gguf")
    assert (parameters.n_ctx, parameters.n_parallel, parameters.load_mode) == (64, 1, "read")
    assert parameters.cpuparams.n_threads == parameters.cpuparams_batch.n_threads == torch.get_num_threads()


def test_a_round_times_each_token_of_the_stream(loaded: Any) -> None:
    played = loaded.round(prompt=[7] * 10, forced=None, new_tokens=4, cold=False)
    assert played["token_ids"] == [10, 11, 12, 13]
    assert len(played["itl_s"]) == 3
    assert min(played["ttft_s"], *played["itl_s"]) >= 1e-3


def test_a_stream_that_is_cut_short_is_no_round(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeServer, "missing", 1)
    with pytest.raises(RuntimeError, match="4 tokens were asked for, and 3 came"):
        loaded.round(prompt=[7] * 10, forced=None, new_tokens=4, cold=False)


def test_logits_are_those_behind_the_prompt_by_token(loaded: Any, tmp_path: Path) -> None:
    loaded.round(prompt=[7] * 10, forced=None, new_tokens=4, cold=False)
    loaded.logits([7] * 13, str(tmp_path / "l.pt"))
    found = torch.load(tmp_path / "l.pt")
    assert found.shape == (4, VOCAB)
    assert torch.equal(found, -torch.arange(VOCAB).float().expand(4, -1))


def fewest_by_search(steps: list[list[int]], slots: int) -> int:
    """Every way to keep at most ``slots`` of what was there and what was used."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for experts in steps:
        after: dict[frozenset[int], int] = {}
        for kept, cost in costs.items():
            paid = cost + sum(expert not in kept for expert in experts)
            choices = kept | set(experts)
            for some in itertools.combinations(choices, min(slots, len(choices))):
                key = frozenset(some)
                after[key] = min(paid, after.get(key, paid))
        costs = after
    return min(costs.values())


def random_routing(seed: int, layers: int, tokens: int, experts: int) -> list[list[list[int]]]:
    """Two experts for each token in each layer."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randperm(experts, generator=generator)[:2].tolist() for _ in range(tokens)] for _ in range(layers)]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_cache_reads_less_than_belady(seed: int, slots: int) -> None:
    [steps] = random_routing(seed, layers=1, tokens=9, experts=5)
    assert least_bytes.belady_misses(steps, slots) == fewest_by_search(steps, slots)


def test_the_request_before_fills_the_slots() -> None:
    found = least_bytes.least_misses(random_routing(0, layers=2, tokens=6, experts=4), 8, 4)
    assert found == {"uses": 24, "per_layer": 0, "pooled": 0}
    alternating = [[[0, 1], [2, 3]] * 3, [[0, 1]] * 6]  # the first layer wants four, the second two
    assert least_bytes.least_misses(alternating, 4, 4) == {"uses": 24, "per_layer": 6, "pooled": 6}
    assert least_bytes.least_misses(alternating, 6, 4)["pooled"] == 0
    [first, _], three = alternating, 3  # of five slots the first layer gets one more
    uneven = least_bytes.least_misses(alternating, 5, 4)["per_layer"]
    assert uneven == least_bytes.belady_misses([*first, *first], three, len(first)) < 6


HOLD = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from cpu.memory_cap import join
join(Path(sys.argv[2]))
held = bytearray(int(sys.argv[3]))
held[::4096] = b"x" * len(held[::4096])
print("held")
"""


def test_a_limit_ends_who_exceeds_it_and_no_one_else() -> None:
    if not memory_cap.can_cap():
        pytest.skip("no control groups of memory may be made here")

    def hold(size: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HOLD, str(BENCH), str(group), str(size)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with memory_cap.memory_cap("a test, of it", 64 << 20) as group:
        assert hold(16 << 20).stdout == "held\n"
        assert hold(128 << 20).returncode == -9
    assert not group.exists()


def test_without_the_right_no_group_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.limit_in_bytes").touch()
    there = memory_cap.HIERARCHIES[-1]._replace(root=tmp_path)
    monkeypatch.setattr(memory_cap, "HIERARCHIES", (there,))
    assert not memory_cap.can_cap()  # the kernel makes no files in this folder
    assert [path.name for path in tmp_path.iterdir()] == ["memory.limit_in_bytes"]
    monkeypatch.setattr(memory_cap, "HIERARCHIES", ())
    assert not memory_cap.can_cap()
