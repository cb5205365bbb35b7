"""The ops in Triton, under the names of their twins. Imports triton: ``kernels/__init__`` alone imports this, late."""

from duoserve.kernels.moe_fill import moe_down_fill, moe_up_fill
from duoserve.kernels.moe_gemm import moe_down, moe_up
from duoserve.kernels.moe_gemv import moe_gemv_down, moe_gemv_up
from duoserve.kernels.route import route_plan

__all__ = ["moe_down", "moe_down_fill", "moe_gemv_down", "moe_gemv_up", "moe_up", "moe_up_fill", "route_plan"]
