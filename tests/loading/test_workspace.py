"""The planned workspace against what ops really hold: never less, and not many times as much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from duoserve import MoEModel
from duoserve.config import EngineConfig, ModelConfig
from duoserve.errors import MemoryBudgetError
from duoserve.kernels.attention_gqa import new_partials, plan_chunks
from duoserve.kernels.matmul import has_native_matmul
from duoserve.kernels.reference_attention import attention
from duoserve.loading.placement import Placement
from duoserve.loading.workspace import (
    FIXED_BYTES,
    FLOAT_BYTES,
    PassMemory,
    partial_bytes,
    recorded_bytes,
    threads_bytes,
    workspace_bytes,
)
from duoserve.models.mixtral import parse_config
from duoserve.models.opened import opened
from duoserve.models.transformer import LOGIT_ROWS
from duoserve.planning.model_cards import find_model
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.toys import greedy, toy_prompt
from tests.models.cases import FAMILIES
from tests.models.cases.case import Case

CONTEXT = 512
GREEDY = greedy(4)
PROMPT = toy_prompt(CONTEXT)
# Each has another part of the pass as its largest.
SHAPES: dict[str, dict[str, Any]] = {
    "experts": {"intermediate_size": 256, "hidden_size": 64},
    "many experts a token": {"num_experts_per_tok": 7, "hidden_size": 64},
    "logits": {"vocab_size": 2048},
    "attention": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64},
    "window": {"sliding_window": 24, "num_attention_heads": 16, "head_dim": 16},
    "norms": {"hidden_size": 256, "num_experts_per_tok": 1, "head_dim": 2},
}


def planned_of_tensors(model: MoEModel) -> int:
    """The planned bytes of what LiveBytes sees: not of what ops allocate within themselves."""
    within = threads_bytes(model.config, model.config.dtype, model.max_context, torch.get_num_threads())
    return model.memory.workspace_bytes - FIXED_BYTES["cpu"] - within


@pytest.mark.parametrize(
    ("dtype", "invariant"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "invariant"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_of_the_whole_context_takes_what_is_planned(
    shape: str, dtype: torch.dtype, invariant: bool, tmp_path: Path
) -> None:
    """The plan counts products in float32, which a CPU with units for bfloat16 does without unless it must."""
    folder = save_mixtral(tmp_path, dtype=dtype, max_position_embeddings=CONTEXT, **SHAPES[shape])
    with MoEModel.from_pretrained(folder, policy="resident", max_context=CONTEXT, invariant=invariant) as model:
        planned = planned_of_tensors(model)
        model.forward(PROMPT[:8])  # what is made once is made
        with LiveBytes() as held:
            logits_TV = model.forward(PROMPT)
        assert held.live == logits_TV.nbytes
        used = held.peak - logits_TV.nbytes
        assert used <= planned
        assert 0.5 * planned < used or (has_native_matmul(dtype) and dtype is torch.bfloat16 and not invariant)


# Each kind of block as the largest part of its model's pass: the family, and what its config has besides.
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sinks": ("gpt_oss", {"num_attention_heads": 16, "head_dim": 16}),
    "clamped experts": ("gpt_oss", {"num_attention_heads": 2, "intermediate_size": 256}),
    "latents": ("deepseek_v2", {"num_attention_heads": 16}),
    "wide latents": ("deepseek_v2", {"num_attention_heads": 8, "qk_nope_head_dim": 64, "v_head_dim": 96}),
    "shared expert": ("deepseek_v2", {"num_attention_heads": 1, "n_shared_experts": 40, "moe_intermediate_size": 24}),
    "gated shared expert": ("qwen2_moe", {"num_attention_heads": 2, "shared_expert_intermediate_size": 1024}),
    "dense layer": ("deepseek_v3", {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1024}),
    "norms of heads": ("qwen3_moe", {"num_attention_heads": 16, "head_dim": 64}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_kind_of_block_takes_what_is_planned(block: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model_type, changes = BLOCKS[block]
    family = FAMILIES[model_type]
    case = Case({**family.cases[family.hard].changes, "max_position_embeddings": CONTEXT, **changes})
    folder = replace(family, cases={block: case}).save(tmp_path, block, dtype)
    with MoEModel.from_pretrained(folder, policy="resident", max_context=CONTEXT) as model:
        planned = planned_of_tensors(model)
        model.forward(PROMPT[:8])
        with LiveBytes() as held:
            logits_TV = model.forward(PROMPT)
        assert 0.5 * planned < held.peak - logits_TV.nbytes <= planned


def test_sums_of_groups_take_what_is_planned(tmp_path: Path) -> None:
    """Of a prompt's rows in one expert there are 6144 each, in groups of 32: ten times as many as of outputs."""
    sizes = {"hidden_size": 1024, "intermediate_size": 96, "head_dim": 8, "num_hidden_layers": 1}
    experts = {"num_local_experts": 1, "num_experts_per_tok": 1, "max_position_embeddings": 2048}
    folder = save_mixtral(tmp_path, dtype=torch.bfloat16, **sizes, **experts)
    with MoEModel.from_pretrained(folder, policy="resident", quantize="int4", max_context=2048) as model:
        planned = model.memory.workspace_bytes
        with LiveBytes() as held:
            logits_TV = model.forward(PROMPT * 4)
        assert held.peak - logits_TV.nbytes <= planned


def test_prompts_that_share_a_pass_take_what_is_planned(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path, max_position_embeddings=CONTEXT, **SHAPES["attention"])
    with MoEModel.from_pretrained(folder, policy="resident", max_context=CONTEXT) as model:
        planned = planned_of_tensors(model)
        prompts = [PROMPT[start : start + 120] for start in (0, 1, 2, 3)]
        model.generate(PROMPT[:8], GREEDY)
        with LiveBytes() as held:
            model.generate(prompts, GREEDY)
        assert 0.5 * planned < held.peak <= planned and held.live == 0


def test_a_long_answer_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path, max_position_embeddings=1024, num_hidden_layers=1)
    with MoEModel.from_pretrained(folder, policy="lru", expert_slots=4, max_context=1024, cache_dir=tmp_path) as model:
        model.generate(PROMPT[:8], GREEDY)
        with LiveBytes() as held:
            assert len(model.generate(PROMPT[:8], GREEDY, max_tokens=200).token_ids) == 200
        assert held.live == 0 and held.peak <= planned_of_tensors(model)


def test_what_compiled_steps_keep_is_planned(tmp_path: Path) -> None:
    """The logits of steps of 1, 4 and 16, and the scores and shares of a whole context in two parts of a step."""
    folder = save_mixtral(tmp_path, num_hidden_layers=1)
    with opened(folder) as found:
        planned = []
        for mode in ("auto", "compiled"):
            wanted = EngineConfig(device="cpu", max_context=CONTEXT, decode_mode=mode)
            planned.append(Placement.of(found, wanted).plan(wanted, None).workspace_bytes)
        vocab, heads = found.config.vocab_size, found.config.blocks.attention.num_heads
    assert planned[1] - planned[0] == 4 * ((1 + 4 + 16) * vocab + 4 * heads * CONTEXT)


def mixtral_8x7b(**changes: Any) -> ModelConfig:
    return parse_config({"model_type": "mixtral", "dtype": "bfloat16", "sliding_window": None, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [200, 700, 2048])
def test_the_scratch_of_a_cpus_attention_is_planned_for_each_thread(num_tokens: int, dtype: torch.dtype) -> None:
    q_THD, k_CGD, v_CGD = (torch.randn(num_tokens, heads, 128, dtype=dtype) for heads in (4, 2, 2))
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        out_THD = attention(q_THD, k_CGD, v_CGD, scale=1.0, window=None)
    normalizers = num_tokens * 4 * FLOAT_BYTES
    within = sum(max(0, event.self_cpu_memory_usage) for event in made.events()) - out_THD.nbytes - normalizers
    assert within == threads_bytes(mixtral_8x7b(), dtype, num_tokens, torch.get_num_threads())


def test_many_threads_raise_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    for num_threads in (2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        planned.append(workspace_bytes(mixtral_8x7b(), torch.bfloat16, torch.device("cpu"), 4096))
    assert planned[1] - planned[0] == 62 * 256 * (512 * 6 + 130 * 4)


def test_mixtrals_8k_prompt_on_a_gpu() -> None:
    """By hand: of 8192 tokens, two experts each, 16384 rows of 14336 and of 4096 elements, and five of the residual."""
    memory = PassMemory(mixtral_8x7b(), torch.bfloat16, on_gpu=True, num_tokens=8192)
    by_hand = 2 * (16384 * (14336 + 4096) + 5 * 8192 * 4096)
    assert by_hand < memory.peak_bytes < 1.05 * by_hand
    assert workspace_bytes(mixtral_8x7b(), torch.bfloat16, torch.device("cuda"), 8192) > 1_000_000_000


@pytest.mark.parametrize("table_tokens", [64, 4096, 20000, 1 << 17])
def test_what_decode_attention_makes_between_its_kernels_is_planned_for_recordings(table_tokens: int) -> None:
    deepseek = find_model("deepseek-v3").config
    for config, heads, width in ((mixtral_8x7b(), 32, 128), (deepseek, 128, 512)):
        made = new_partials(torch.empty(3, heads, width, device="meta"), plan_chunks(table_tokens, 3).num_chunks)
        assert partial_bytes(config, 3, table_tokens) == sum(part.nbytes for part in made)
    assert recorded_bytes(deepseek, torch.bfloat16, 32768) > partial_bytes(deepseek, 64, 32768) > 2_000_000_000


@pytest.mark.parametrize(("changes", "dtype"), [({}, torch.float32), ({"sliding_window": 4096}, torch.bfloat16)])
def test_scores_are_never_those_of_a_whole_prompt(changes: dict[str, Any], dtype: torch.dtype) -> None:
    memory = PassMemory(mixtral_8x7b(**changes), dtype, on_gpu=True, num_tokens=32768)
    assert memory.attention_bytes < 32768 * 32768 * 32 * 2 / 8


def test_logits_are_planned_by_the_block() -> None:
    wide = PassMemory(mixtral_8x7b(vocab_size=151936), torch.bfloat16, on_gpu=True, num_tokens=8192)
    assert wide.logits_bytes < LOGIT_ROWS * 151936 * 6 * 2


def test_a_context_whose_passes_do_not_fit_is_refused_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # each takes half a MiB
    folder = save_mixtral(tmp_path, max_position_embeddings=8192)
    with pytest.raises(MemoryBudgetError, match=r"workspace \d+ bytes.*lower max_context"):
        MoEModel.from_pretrained(folder, memory="30MiB", max_context=8192)
    with MoEModel.from_pretrained(folder, memory="30MiB", max_context=1024) as model:
        assert model.memory.total_bytes <= 30 << 20
