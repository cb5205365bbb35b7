"""The same promises on a GPU: the CPU's tokens, equal bits whatever moved, the cap kept; skipped without one.

Here too is what takes a GPU for one test alone: a file of its own would be a process of its own (``gpu_suite.sh``).
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duoserve import MoEModel
from duoserve.experts.pinned import pin, unpin
from duoserve.experts.rows import aligned_rows
from duoserve.kv_cache import PAGE_TOKENS, PagedKVCache, SequenceKV
from duoserve.loading.workspace import FIXED_BYTES, recorded_bytes
from duoserve.models.opened import opened
from duoserve.planning.measuring import RATES, measure
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.toys import greedy, toy_prompt
from tests.models.cases import FAMILIES
from tests.models.cases.quantized import CASES
from tests.scheduling.fortune import GUESSING, STREAMING, any_teller

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = greedy(24)
PROMPT = toy_prompt(30)


def test_bard_writes_on_a_gpu_what_it_writes_on_a_cpu() -> None:
    written = []
    for device in ("cpu", "cuda"):
        with MoEModel.from_pretrained("bard", device=device, dtype="float32", expert_slots="25%") as model:
            written.append(model.generate("To be, or", GREEDY).token_ids)
    assert written[0] == written[1]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("gpu"), dtype=request.param)


@pytest.fixture(scope="module")
def truth(folder: Path) -> tuple[list[int], Tensor]:
    """What the resident run writes, and the logits of all of it."""
    with MoEModel.from_pretrained(folder, device="cuda", policy="resident") as model:
        tokens = model.generate(PROMPT, GREEDY).token_ids
        return tokens, model.forward(PROMPT + tokens)


@pytest.mark.parametrize(
    ("slots", "host_memory"),
    [(3, "auto"), (3, 0), (6, "20KiB"), (12, "auto"), (12, 0), (24, "auto")],
    ids=["3-ram", "3-disk", "6-ram_and_disk", "12-ram", "12-disk", "24-ram"],
)
@pytest.mark.parametrize("policy", STREAMING)
def test_equal_bits(
    policy: str, slots: int, host_memory: str | int, folder: Path, truth: tuple[list[int], Tensor], tmp_path: Path
) -> None:
    """What is predicted is of no consequence: half of these policies go by somebody who lies on purpose."""
    tokens, logits_TV = truth
    with MoEModel.from_pretrained(
        folder,
        device="cuda",
        policy=policy,
        expert_slots=slots,
        host_memory=host_memory,
        predictor=any_teller("liar", seed=slots, horizon=2) if policy in GUESSING else None,
        cache_dir=tmp_path,
    ) as model:
        for _ in range(3):
            assert model.generate(PROMPT, GREEDY).token_ids == tokens
        assert torch.equal(model.forward(PROMPT + tokens).view(torch.int32), logits_TV.view(torch.int32))


def peaks() -> dict[str, int]:
    """The most bytes that tensors held, and that the allocator had taken for them."""
    stats = torch.cuda.memory_stats()
    return {kind: stats[f"{kind}_bytes.all.peak"] for kind in ("allocated", "reserved")}


@pytest.fixture
def before() -> dict[str, int]:
    """What is held before the test, with nothing in reserve and no garbage."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peaks()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def long_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("long"), dtype=request.param, max_position_embeddings=2048)


@pytest.mark.parametrize("policy", ["on-demand", "layer-prefetch", "lru"])
def test_the_cap_is_kept_and_nothing_grows(policy: str, long_folder: Path, before: dict[str, int]) -> None:
    cap = 200 << 20
    settings = greedy(1000)
    with MoEModel.from_pretrained(long_folder, device="cuda", policy=policy, memory=cap, max_context=2048) as model:
        for _ in range(2):  # recording the first one's steps lets go of cuBLAS's workspace, which the second gets anew
            model.generate(PROMPT, settings)
        gc.collect()
        held, warm = torch.cuda.memory_allocated(), peaks()
        model.generate(PROMPT, settings)
        gc.collect()
        assert torch.cuda.memory_allocated() == held and peaks() == warm
        assert model.memory.total_bytes <= cap
        assert all(warm[kind] - before[kind] <= cap for kind in warm)


@pytest.mark.parametrize("mode", ["event", "graph"])
def test_a_model_that_is_closed_leaves_nothing(mode: str, folder: Path) -> None:
    """What the first one has made once for all, as handles of libraries, serves the others."""
    held = []
    for _ in range(3):
        with MoEModel.from_pretrained(folder, device="cuda", policy="lru", expert_slots=10, decode_mode=mode) as model:
            model.generate(PROMPT, GREEDY)
        del model
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 32000},
        {"intermediate_size": 2048, "num_experts_per_tok": 4},
        {"sliding_window": 500},
        {"num_attention_heads": 16, "head_dim": 128},
    ],
    ids=["logits", "experts", "window", "attention"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_prompt_of_the_whole_context_keeps_within_the_plan(
    changes: dict[str, int], dtype: torch.dtype, tmp_path: Path, before: dict[str, int]
) -> None:
    made = save_mixtral(tmp_path, dtype=dtype, hidden_size=256, max_position_embeddings=4096, **changes)
    prompt = toy_prompt(4096)
    with MoEModel.from_pretrained(made, device="cuda", policy="lru", expert_slots=6, max_context=4096) as model:
        model.forward(prompt)
        used, plan = peaks(), model.memory
        assert all(used[kind] - before[kind] <= plan.total_bytes for kind in used)
        recorded = recorded_bytes(model.config, dtype, 4096)  # of decode steps, of which there is none
        activations = plan.workspace_bytes - FIXED_BYTES["cuda"] - recorded
        assert used["allocated"] - before["allocated"] > plan.total_bytes - plan.workspace_bytes + activations // 3


def test_the_host_waits_for_the_rows_of_a_context_once_a_pass(folder: Path) -> None:
    with opened(folder) as found:
        config = found.config
    cache, sequences = PagedKVCache(config, 8 * PAGE_TOKENS, torch.bfloat16, "cuda"), [SequenceKV(), SequenceKV()]
    for num_tokens in (PAGE_TOKENS, 2 * PAGE_TOKENS):  # one after the other, so that no sequence's pages adjoin
        for sequence in sequences:
            cache.reserve(sequence, num_tokens)
    kv = cache.batch(cache.extend([(sequence, [0] * 70) for sequence in sequences])).kv
    kv.context(0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in range(config.num_layers):
            for number in range(len(sequences)):
                kv.context(layer, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_computes_on_a_gpu_what_it_computes_on_a_cpu(model_type: str, tmp_path: Path) -> None:
    family = FAMILIES[model_type]
    assert_same_on_both(family.save(tmp_path / "model", family.hard), family.top_k + 1, tmp_path)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("-ordered")])
def test_quantized_experts_are_on_a_gpu_what_they_are_on_a_cpu(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, _ = case.save(tmp_path / "model")
    assert_same_on_both(folder, case.family.top_k + 1, tmp_path)


def assert_same_on_both(folder: Path, slots: int, cache_dir: Path) -> None:
    results = []
    for device in ("cpu", "cuda"):
        with MoEModel.from_pretrained(
            folder, device=device, dtype="float32", expert_slots=slots, cache_dir=cache_dir
        ) as model:
            results.append((model.generate(PROMPT, GREEDY).token_ids, model.forward(PROMPT)))
    (cpu_tokens, cpu_TV), (gpu_tokens, gpu_TV) = results
    assert gpu_tokens == cpu_tokens
    assert ((gpu_TV - cpu_TV).norm() / cpu_TV.norm()).item() <= 1e-4


def test_all_rates_are_measured(tmp_path: Path) -> None:
    found = measure(torch.device("cuda", 0), tmp_path)
    assert found.keys() == set(RATES)
    assert found["memory"] > found["link"] > 1e9


def test_page_locking_that_is_refused_does_not_spoil_the_next_launch() -> None:
    rows_NB = aligned_rows(2, 4096)
    assert pin(rows_NB)
    with pytest.warns(RuntimeWarning, match="could not be page-locked"):
        assert not pin(rows_NB)  # for it is already
    assert torch.ones(3, device="cuda").sum().item() == 3
    unpin(rows_NB)
