"""The ops in Triton, under the names of their twins. Imports triton, so only ``kernels/__init__`` imports it, late."""

from duoserve.kernels.attention_gqa import decode_attention
from duoserve.kernels.attention_mla import mla_decode_attention
from duoserve.kernels.cache_rows import write_rows
from duoserve.kernels.combine import moe_combine
from duoserve.kernels.copies import page_gather
from duoserve.kernels.moe_fill import moe_down_fill, moe_up_fill
from duoserve.kernels.moe_gemm import moe_down, moe_experts, moe_up
from duoserve.kernels.moe_gemv import moe_gemv_down, moe_gemv_up
from duoserve.kernels.norm import add_rms_norm, rms_norm
from duoserve.kernels.rope import rope_write_kv
from duoserve.kernels.route_sort import route_plan
from duoserve.kernels.router_choice import router_topk

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "mla_decode_attention",
    "moe_combine",
    "moe_down",
    "moe_down_fill",
    "moe_experts",
    "moe_gemv_down",
    "moe_gemv_up",
    "moe_up",
    "moe_up_fill",
    "page_gather",
    "rms_norm",
    "rope_write_kv",
    "route_plan",
    "router_topk",
    "write_rows",
]
