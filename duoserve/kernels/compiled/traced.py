"""The ops in a form that a tracer can follow: none reads a value, and products of one row are loops to be fused.

T tokens, N rows of a matrix, K its inner dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from duoserve import kernels
from duoserve.kernels import reference
from duoserve.kernels.attention_together import decode_attention_together
from duoserve.kernels.compiled.streamed import streamed_product
from duoserve.kernels.routed_rows import HostWork, RoutePlan


class TracedOps(TorchFunctionMode):
    """While this mode is on, ops that read values, or that a compiler cannot see into, are replaced by twins."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        twin: Callable[..., Any] = _TWINS.get(func, func)
        return twin(*args, **(kwargs or {}))


@torch.library.custom_op("duoserve::decode_attention", mutates_args=())
def _decode_attention(
    q_BHD: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The op as a call that a compiler does not look into, as its work depends on the values of lengths."""
    return decode_attention_together(
        q_BHD, k_pages_PSGD, v_pages_PSGD, page_table_BM, lengths_B, scale, window, sinks_H
    )


DECODE_ATTENTION = torch.ops.duoserve.decode_attention.default


@_decode_attention.register_fake
def _(q_BHD: Tensor, k_pages_PSGD: Tensor, v_pages_PSGD: Tensor, *_rest: Any) -> Tensor:
    return q_BHD.new_empty(*q_BHD.shape[:2], v_pages_PSGD.shape[-1])


@torch.library.custom_op("duoserve::mla_decode_attention", mutates_args=())
def _mla_decode_attention(
    q_latent_BHL: Tensor,
    q_rope_BHR: Tensor,
    latent_pages_PSW: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
) -> Tensor:
    return reference.mla_decode_attention(
        q_latent_BHL, q_rope_BHR, latent_pages_PSW, page_table_BM, lengths_B, scale
    ).contiguous()


@_mla_decode_attention.register_fake
def _(q_latent_BHL: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(q_latent_BHL, memory_format=torch.contiguous_format)


def _write_rows(values_TW: Tensor, pages_PSW: Tensor, rows_T: Tensor) -> None:
    """Padding, whose rows are negative and last, repeats the first token's write: to leave it out changes a shape."""
    source_T = torch.where(rows_T < 0, 0, torch.arange(rows_T.shape[0], device=rows_T.device))
    rows_T, page_tokens = rows_T[source_T], pages_PSW.shape[1]
    # Not into a view of the pages, for which PyTorch's compiler before 2.13 copied all of them there and back.
    pages_PSW.index_put_((rows_T // page_tokens, rows_T % page_tokens), values_TW[source_T])


def _rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    rows_T: Tensor,
    interleaved: bool = False,
) -> Tensor:
    _write_rows(reference.apply_rope(k_TGD, cos_T1R, sin_T1R, interleaved), k_pages_PSGD, rows_T)
    _write_rows(v_TGD, v_pages_PSGD, rows_T)
    return reference.apply_rope(q_THD, cos_T1R, sin_T1R, interleaved)


def _no_plan(topk_ids_TK: Tensor, slots_E: Tensor) -> RoutePlan:
    """No plan: the host makes it outside of the traced work, when it knows the routers' choice."""
    nothing = HostWork.of([])
    return RoutePlan(slots_E.new_empty(0), slots_E.new_empty(0), nothing, nothing, topk_ids_TK.shape[1])


def _mv(w_NK: Tensor, x_K: Tensor) -> Tensor:
    return streamed_product(w_NK, x_K).to(x_K.dtype)


def _addmv(bias_N: Tensor, w_NK: Tensor, x_K: Tensor) -> Tensor:
    return (streamed_product(w_NK, x_K) + bias_N).to(x_K.dtype)


def _linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    if len(x_TK) > 1:
        return F.linear(x_TK, w_NK, bias_N)
    return (_mv(w_NK, x_TK[0]) if bias_N is None else _addmv(bias_N, w_NK, x_TK[0]))[None]


_TWINS: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType(
    {
        kernels.route_plan: _no_plan,
        kernels.router_topk: reference.router_topk,
        kernels.moe_combine: reference.moe_combine,
        kernels.rms_norm: reference.rms_norm,
        kernels.add_rms_norm: reference.add_rms_norm,
        kernels.rope_write_kv: _rope_write_kv,
        kernels.write_rows: _write_rows,
        kernels.decode_attention: _decode_attention,
        kernels.mla_decode_attention: _mla_decode_attention,
        torch.mv: _mv,
        torch.addmv: _addmv,
        F.linear: _linear,
    }
)
