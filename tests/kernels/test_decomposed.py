"""Loops in place of ops: attention of one token at every length of context, and a router's sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from duoserve.kernels import reference
from duoserve.kernels.compiled.attention_loops import streamed_attention
from duoserve.kernels.compiled.compiler import CpuCompiler
from duoserve.kernels.compiled.decomposed import COUNTED, DECOMPOSED
from duoserve.kernels.compiled.traced import DECODE_ATTENTION, TracedOps
from tests.helpers.compiled_case import needs_compiler
from tests.kernels.common import assert_close

PAGES, PAGE_TOKENS = 6, 8
SORT = torch.ops.aten.sort.stable


class Context:
    """One sequence of so many tokens, in pages out of order; NaN in all that is not its own."""

    def __init__(self, num_tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        heads, kv_heads, dim = shape
        generator = torch.Generator().manual_seed(num_tokens)
        self.q_1HD = torch.randn(1, heads, dim, generator=generator).to(dtype)
        self.k_PSGD, self.v_PSGD = torch.full((2, PAGES + 1, PAGE_TOKENS, kv_heads, dim), torch.nan, dtype=dtype)
        self.table_1M = torch.randperm(PAGES, generator=generator)[None].int()
        self.lengths_1 = torch.tensor([num_tokens], dtype=torch.int32)
        for pages_PSGD in (self.k_PSGD, self.v_PSGD):
            rows_CGD = torch.randn(num_tokens, kv_heads, dim, generator=generator).to(dtype)
            for at, row_GD in enumerate(rows_CGD):
                pages_PSGD[self.table_1M[0, at // PAGE_TOKENS], at % PAGE_TOKENS] = row_GD
        self.table_1M[0, -(-num_tokens // PAGE_TOKENS) :] = -1  # as in a layout

    def operands(self, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """With so many pages of the table."""
        return self.q_1HD, self.k_PSGD, self.v_PSGD, self.table_1M[:, :width], self.lengths_1, 0.3

    @property
    def truth(self) -> Tensor:
        """In float64."""
        q_1HD, k_PSGD, v_PSGD, *rest = self.operands(PAGES)
        return reference.decode_attention(q_1HD.double(), k_PSGD.double(), v_PSGD.double(), *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 4, 16), (6, 2, 8), (8, 1, 40)])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 40, 48])
def test_the_tokens_of_the_context_are_attended_to_and_nothing_else(
    num_tokens: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    context = Context(num_tokens, shape, dtype)
    out_1HD = streamed_attention(*context.operands(PAGES))
    assert out_1HD.dtype is dtype
    assert_close(out_1HD, context.truth, dtype)


@needs_compiler
def test_loops_serve_every_length_with_bits_that_the_width_of_the_table_does_not_change() -> None:
    context, out_1HD = Context(48, (6, 2, 16), torch.bfloat16), torch.zeros(1, 6, 16, dtype=torch.bfloat16)

    def attend(width: int) -> None:
        operands = *context.operands(width)[:-1], 0.3
        out_1HD.copy_(DECODE_ATTENTION(*operands, None, None))

    recording = CpuCompiler().record_for(attend, range(2, PAGES + 1))
    for num_tokens in (1, 8, 9, 33, 48):
        context.lengths_1.fill_(num_tokens)
        results = []
        for width in range(max(2, -(-num_tokens // PAGE_TOKENS)), PAGES + 1):
            out_1HD.fill_(torch.nan)
            recording.replay(width)
            results.append(out_1HD.clone())
        assert_close(results[0], context.truth, torch.bfloat16)
        assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize(
    ("heads", "window", "sinks", "sequences"),
    [(4, 8, False, 1), (4, None, True, 1), (4, None, False, 2), (18, None, False, 1)],
)
def test_the_op_keeps_what_loops_do_not_compute(heads: int, window: int | None, sinks: bool, sequences: int) -> None:
    """Windows, sinks, several sequences, and more queries of a KV head than a core has registers for."""
    q_BHD, pages = torch.randn(sequences, heads, 8), torch.randn(2, 3, PAGE_TOKENS, 2, 8)
    table_BM, lengths_B = torch.zeros(sequences, 2, dtype=torch.int32), torch.ones(sequences, dtype=torch.int32)
    sinks_H = torch.zeros(heads) if sinks else None
    attend = DECOMPOSED[DECODE_ATTENTION]
    assert attend(q_BHD, *pages, table_BM, lengths_B, 0.3, window, sinks_H) is NotImplemented
    assert attend(q_BHD[:1, :4], *pages, table_BM[:1], lengths_B[:1], 0.3) is not NotImplemented


special = st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")])


@given(st.integers(1, 9).flatmap(lambda e: st.lists(st.lists(special | st.floats(width=32), min_size=e, max_size=e))))
def test_a_router_is_sorted_for_as_the_op_does_it(rows: list[list[float]]) -> None:
    scores_TE = torch.tensor(rows or [[1.0]], dtype=torch.float32)
    expected = SORT(scores_TE, stable=True, dim=1, descending=True)
    values_TE, ids_TE = DECOMPOSED[SORT](scores_TE, stable=True, dim=1, descending=True)
    assert torch.equal(ids_TE, expected[1])
    assert torch.equal(values_TE.nan_to_num(7.0), expected[0].nan_to_num(7.0))


def test_other_sorts_are_left_to_the_op() -> None:
    sort, scores_TE = DECOMPOSED[SORT], torch.rand(2, COUNTED)
    assert sort(scores_TE, stable=True, dim=-1, descending=True) is not NotImplemented
    assert sort(scores_TE, stable=True, dim=-1, descending=False) is NotImplemented
    assert sort(scores_TE, stable=True, dim=0, descending=True) is NotImplemented
    assert sort(scores_TE[0], stable=True, dim=-1, descending=True) is NotImplemented
    assert sort(torch.rand(2, COUNTED + 1), stable=True, dim=-1, descending=True) is NotImplemented


def test_a_traced_router_has_nothing_left_to_sort() -> None:
    """The decomposition has the op that the router's own sort becomes."""

    def route(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        with TracedOps():
            return reference.router_topk(logits_TE, 2)

    logits_TE = torch.randn(3, 8)
    graph = make_fx(make_fx(route)(logits_TE), dict(DECOMPOSED))(logits_TE)
    assert not [node for node in graph.graph.nodes if "sort" in str(node.target)]
    for mine, theirs in zip(graph(logits_TE), reference.router_topk(logits_TE, 2), strict=True):
        assert torch.equal(mine, theirs)
