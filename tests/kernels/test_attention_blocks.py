"""Attention of more queries than are computed at a time, against float64 over all scores at once; what computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import cudnn_sdp_enabled, flash_sdp_enabled, math_sdp_enabled, mem_efficient_sdp_enabled
from torch.nn.attention import SDPBackend

from duoserve.kernels import QUERY_ROWS, attention, reference_attention
from tests.kernels.common import DEVICE, assert_close

HEADS, GROUPS, DIM = 4, 2, 16


def truth(q_THD: Tensor, k_CGD: Tensor, v_CGD: Tensor, window: int | None, sinks_H: Tensor | None) -> Tensor:
    """The formula as it is written, in float64."""
    num_new, num_context = len(q_THD), len(k_CGD)
    k_CHD, v_CHD = (x.double().repeat_interleave(HEADS // GROUPS, dim=1) for x in (k_CGD, v_CGD))
    scores_HTC = torch.einsum("thd,chd->htc", q_THD.double(), k_CHD) * DIM**-0.5
    age_TC = torch.arange(num_context - num_new, num_context, device=DEVICE)[:, None]
    age_TC = age_TC - torch.arange(num_context, device=DEVICE)
    scores_HTC.masked_fill_((age_TC < 0) | (age_TC >= (window or num_context)), float("-inf"))
    if sinks_H is not None:
        scores_HTC = torch.cat((scores_HTC, sinks_H.double()[:, None, None].expand(-1, num_new, 1)), dim=-1)
    return torch.einsum("htc,chd->thd", scores_HTC.softmax(-1)[..., :num_context], v_CHD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("earlier", [0, 70])
def test_blocks_of_queries(earlier: int, window: int | None, sinks: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(earlier)
    num_new = 2 * QUERY_ROWS + 1  # the last block has one query
    q_THD = torch.randn(num_new, HEADS, DIM, device=DEVICE).to(dtype)
    k_CGD, v_CGD = (torch.randn(earlier + num_new, GROUPS, DIM, device=DEVICE).to(dtype) for _ in range(2))
    sinks_H = torch.randn(HEADS, device=DEVICE).to(dtype) if sinks else None
    got = attention(q_THD, k_CGD, v_CGD, DIM**-0.5, window, sinks_H)
    assert_close(got, truth(q_THD, k_CGD, v_CGD, window, sinks_H), dtype, roundings=2)


@pytest.mark.parametrize("rest", [0, 1, 200], ids=["whole", "one_query", "200_queries"])
@pytest.mark.parametrize("window", [None, 300])
def test_no_block_is_larger_than_the_one_before(window: int | None, rest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's allocator would keep the memory of each."""
    sizes: list[int] = []

    def noted(q_THD: Tensor, k_CGD: Tensor, *others: Any) -> Tensor:
        sizes.append(len(q_THD) * len(k_CGD))
        return attention(q_THD, k_CGD, *others)

    monkeypatch.setattr(reference_attention, "attention", noted)
    num_new = 3 * QUERY_ROWS + rest
    q_THD, kv_CGD = torch.zeros(num_new, HEADS, DIM), torch.zeros(num_new + 70, GROUPS, DIM)
    reference_attention.attention(q_THD, kv_CGD, kv_CGD, 1.0, window)
    blocks = sizes[1:]
    assert len(blocks) == 3 + (rest > 0) and blocks == sorted(blocks, reverse=True)


# By what a GPU is asked for: new tokens, context tokens, width of values, window, whether there are sinks.
ASKED: dict[str, tuple[int, int, int, int | None, bool]] = {
    "whole prompt": (300, 300, DIM, None, False),
    "narrow values": (300, 300, DIM // 2, None, False),
    "window": (300, 300, DIM, 40, False),
    "sinks": (300, 300, DIM, None, True),
    "behind others": (30, 300, DIM, None, False),
    "one query": (1, 300, DIM, None, False),
    "one query with sinks": (1, 300, DIM, None, True),
}


def asked(what: str, longer: int, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Operands of ``attention``, ``longer`` tokens longer."""
    num_new, num_context, width, window, sinks = ASKED[what]
    num_new += longer if num_new > 1 else 0
    q_THD = torch.zeros(num_new, HEADS, DIM, dtype=dtype, device=device)
    k_CGD = torch.zeros(num_context + longer, GROUPS, DIM, dtype=dtype, device=device)
    sinks_H = torch.zeros(HEADS, dtype=dtype, device=device) if sinks else None
    return q_THD, k_CGD, k_CGD[..., :width], 1.0, window, sinks_H


class OnGpu(Tensor):
    """Says that it is on a GPU, and is not; so does what is made of it."""

    is_cuda, is_cpu = True, False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("what", ASKED)
def test_a_gpu_is_asked_for_attention_neither_by_plans_nor_with_less_than_float32(
    what: str, on_gpu: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[tuple[bool, ...]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        allowed.append((flash_sdp_enabled(), mem_efficient_sdp_enabled(), math_sdp_enabled(), cudnn_sdp_enabled()))
        return q.new_empty((*q.shape[:-1], v.shape[-1]))

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    before = cudnn_sdp_enabled()
    q_THD, *others = asked(what, 0, "cpu", dtype)
    attention(q_THD.as_subclass(OnGpu) if on_gpu else q_THD, *others)
    fused = not (on_gpu and dtype is torch.float32)
    assert set(allowed) == {(fused, fused, True, before and not on_gpu)}
    assert cudnn_sdp_enabled() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("what", ASKED)
def test_no_length_of_a_prompt_is_planned_on_a_gpu(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch, which prefers cuDNN on Hopper, would have it for each new one."""
    chosen: list[int] = []
    attend = F.scaled_dot_product_attention

    def noted(*operands: Tensor, **options: Any) -> Tensor:
        chosen.append(torch._fused_sdp_choice(*operands, **options))
        return attend(*operands, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for longer in range(5):
        attention(*asked(what, longer, "cuda"))
    assert len(chosen) >= 5 and int(SDPBackend.CUDNN_ATTENTION.value) not in chosen
