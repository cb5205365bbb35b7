"""The same promises on a GPU: the CPU's tokens, equal bits whatever moved, the cap kept; skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duoserve import ConfigError, MoEModel, SamplingParams
from tests.checkpoints import save_mixtral
from tests.models.cases import FAMILIES

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


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "gpt_oss"])
def test_every_family_computes_on_a_gpu_what_it_computes_on_a_cpu(model_type: str, tmp_path: Path) -> None:
    family = FAMILIES[model_type]
    folder = family.save(tmp_path / "model", family.hard)
    results = []
    for device in ("cpu", "cuda"):
        with MoEModel.from_pretrained(
            folder, device=device, dtype="float32", expert_slots=family.top_k + 1, cache_dir=tmp_path
        ) as model:
            results.append((model.generate(PROMPT, GREEDY).token_ids, model.forward(PROMPT)))
    (cpu_tokens, cpu_TV), (gpu_tokens, gpu_TV) = results
    assert gpu_tokens == cpu_tokens
    assert ((gpu_TV - cpu_TV).norm() / cpu_TV.norm()).item() <= 1e-4


def test_gpt_oss_is_refused_on_a_gpu(tmp_path: Path) -> None:
    folder = FAMILIES["gpt_oss"].save(tmp_path, "plain")
    with pytest.raises(ConfigError, match="gpt_oss runs on CPUs only so far: load it with device='cpu'"):
        MoEModel.from_pretrained(folder, device="cuda")
