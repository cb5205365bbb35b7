"""The same promises on a GPU: the CPU's tokens, equal bits whatever moved, the cap kept; skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duoserve import MoEModel, SamplingParams
from tests.checkpoints import save_mixtral

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPT = [(11 * i * i + 5 * i) % 95 + 1 for i in range(30)]


def test_bard_writes_on_a_gpu_what_it_writes_on_a_cpu() -> None:
    written = []
    for device in ("cpu", "cuda"):
        with MoEModel.from_pretrained("bard", device=device, dtype="float32", expert_slots="25%") as model:
            written.append(model.generate("To be, or", GREEDY).token_ids)
    assert written[0] == written[1]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("gpu"), dtype=request.param)


@pytest.mark.parametrize("host_memory", ["auto", 0, "20KiB"], ids=["ram", "disk", "ram_and_disk"])
@pytest.mark.parametrize("slots", [3, 6, 12, 24])
@pytest.mark.parametrize("policy", ["on-demand", "layer-prefetch", "lru"])
def test_equal_bits(policy: str, slots: int, host_memory: str | int, folder: Path, tmp_path: Path) -> None:
    with MoEModel.from_pretrained(folder, device="cuda", policy="resident") as model:
        tokens = model.generate(PROMPT, GREEDY).token_ids
        logits_TV = model.forward(PROMPT + tokens)
    with MoEModel.from_pretrained(
        folder, device="cuda", policy=policy, expert_slots=slots, host_memory=host_memory, cache_dir=tmp_path
    ) as model:
        for _ in range(3):
            assert model.generate(PROMPT, GREEDY).token_ids == tokens
        assert torch.equal(model.forward(PROMPT + tokens).view(torch.int32), logits_TV.view(torch.int32))


def test_the_cap_is_kept(folder: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with MoEModel.from_pretrained(folder, device="cuda", policy="lru", memory="600MiB", max_context=2048) as model:
        model.generate(PROMPT, SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True))
        after_warm_up = torch.cuda.memory_allocated()
        model.generate(PROMPT, SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True))
        assert torch.cuda.memory_allocated() == after_warm_up
        assert torch.cuda.max_memory_allocated() - before <= 600 << 20
