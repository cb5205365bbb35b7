"""With ``invariant=True`` a request has the same bits alone and in any batch, in prompts and in decode steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duoserve import MoEModel
from duoserve.errors import ConfigError
from duoserve.kernels.matmul import TILE_ROWS, Products, batched_product, float_product, linear, tiles_keep_bits
from duoserve.request import Request
from tests.helpers.checkpoints import BARD, save_mixtral
from tests.helpers.toys import greedy
from tests.kernels.common import assert_close
from tests.models.cases import FAMILIES

STEPS = 4
# A prompt of one token, some shorter and longer than a tile, and so many that steps have more than NARROW_ROWS rows.
PROMPTS = [[(7 * i * i + 3 * n) % 60 + 1 for i in range(n)] for n in (1, 5, 37, 2, 18, 16, 3, 9)]


def logits(model: MoEModel, prompts: Sequence[list[int]]) -> list[Tensor]:
    """Float32 [1 + STEPS, V] of each prompt, all of them in one batch: the prompt's last token, then every step."""
    engine = model._runtime.engine
    passes, cache = engine._passes, engine._cache
    requests = [Request(prompt, greedy(STEPS + 1), number=number) for number, prompt in enumerate(prompts)]
    for request in requests:
        cache.reserve(request.kv, request.num_tokens)
    found = [passes.advance(passes.start_prefill(requests, interruptible=False), passes.num_layers)]
    for _ in range(STEPS):
        for request, row_V in zip(requests, found[-1], strict=True):
            request.output_ids.append(int(row_V.argmax()))
        found.append(passes.decode(requests))
    for request in requests:
        cache.release(request.kv)
    return list(torch.stack(found).unbind(1))


def changed(model: MoEModel) -> list[int]:
    """The prompts whose bits are others in a batch than alone."""
    alone = [logits(model, [prompt])[0] for prompt in PROMPTS]
    together = logits(model, PROMPTS)
    return [i for i, (a, b) in enumerate(zip(alone, together, strict=True)) if not torch.equal(a, b)]


@pytest.fixture(scope="module", params=["mixtral", *FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mixtral":
        return save_mixtral(folder)
    family = FAMILIES[request.param]
    return family.save(folder, next(iter(family.cases)))


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained(
        folder, dtype=request.param, expert_slots="50%", max_context=1024, invariant=True
    ) as model:
        yield model


def test_a_request_has_its_bits_in_any_batch(model: MoEModel) -> None:
    assert changed(model) == []


def test_its_logits_are_the_models(folder: Path) -> None:
    found = []
    for invariant in (True, False):
        with MoEModel.from_pretrained(folder, dtype="float32", max_context=1024, invariant=invariant) as model:
            found.append(logits(model, [PROMPTS[2]])[0])
    assert float((found[0] - found[1]).norm() / found[1].norm()) <= 1e-5


@pytest.mark.parametrize("quantize", ["bf12", "int8", "int4"])
def test_so_it_has_with_quantized_experts(tmp_path: Path, quantize: str) -> None:
    folder = save_mixtral(tmp_path, hidden_size=64, intermediate_size=64, dtype=torch.bfloat16)
    with MoEModel.from_pretrained(
        folder, dtype="bfloat16", quantize=quantize, max_context=1024, invariant=True
    ) as model:
        assert changed(model) == []


def test_without_it_a_batch_changes_bits(tmp_path: Path) -> None:
    with MoEModel.from_pretrained(save_mixtral(tmp_path), dtype="float32", max_context=1024) as model:
        assert changed(model) != []


def test_bards_tokens_alone_are_those_in_a_full_batch() -> None:
    params = greedy(24)
    prompts = ["To be, or", "O Romeo,", "KING", "Now is the winter", "If", "Exeunt", "All the world's a", "Out,"]
    with MoEModel.from_pretrained(BARD, expert_slots="25%", max_context=1024, invariant=True) as model:
        together = model.generate(prompts, params)
        assert [model.generate(prompt, params).token_ids for prompt in prompts] == [one.token_ids for one in together]


@pytest.mark.parametrize("products", [Products.BY_ROW, Products.BY_TILE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_give_a_row_its_bits_among_any_others(products: Products, dtype: torch.dtype) -> None:
    x_TK, w_NK = (torch.randn(rows, 331).to(dtype) for rows in (3 * TILE_ROWS + 5, 77))
    bias_N = torch.randn(77).to(dtype)
    alone = torch.cat([linear(row_K[None], w_NK, bias_N, products) for row_K in x_TK])
    for rows in (2, 7, TILE_ROWS, TILE_ROWS + 1, len(x_TK)):
        assert torch.equal(linear(x_TK[-rows:], w_NK, bias_N, products), alone[-rows:])
    assert_close(alone, x_TK.double() @ w_NK.double().T + bias_N, dtype)
    x_TK, w_NK = x_TK.float(), w_NK.float()
    alone = torch.cat([float_product(row_K[None], w_NK, products) for row_K in x_TK])
    assert_close(alone, x_TK.double() @ w_NK.double().T, torch.float32)
    assert torch.equal(float_product(x_TK, w_NK, products), alone)


def test_products_of_heads_give_a_row_its_bits_among_any_others() -> None:
    x_HBD, w_HDN = torch.randn(3, 9, 40), torch.randn(3, 40, 17)
    together = batched_product(x_HBD, w_HDN, Products.BY_ROW)
    alone = [batched_product(x_HBD[:, b : b + 1], w_HDN, Products.BY_ROW) for b in range(9)]
    assert torch.equal(together, torch.cat(alone, dim=1))
    torch.testing.assert_close(together, batched_product(x_HBD, w_HDN, Products.FASTEST))


def test_it_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiles_keep_bits(torch.get_num_threads())
    monkeypatch.setattr("duoserve.loading.placement.tiles_keep_bits", lambda num_threads: False)
    with pytest.raises(ConfigError, match=rf"float32 products by {torch.get_num_threads()} threads .*OMP_NUM_THREADS"):
        MoEModel.from_pretrained(BARD, invariant=True)


@pytest.mark.parametrize("num_threads", [2, 60, 64, 80])
def test_it_can_be_had_with_many_threads(num_threads: int) -> None:
    """Each number of threads is tried anew; from 60 on they share out products of odd sizes in another way."""
    script = (
        "import torch; from duoserve.kernels.matmul import tiles_keep_bits; tiles_keep_bits(torch.get_num_threads()); "
        f"torch.set_num_threads({num_threads}); assert tiles_keep_bits({num_threads})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("shape_NK", [(515, 769), (768, 1536)])
def test_threads_that_share_out_sums_change_no_bits(shape_NK: tuple[int, int]) -> None:
    """Two threads cut the products of many rows elsewhere than those of few, on some CPUs; a process has one count."""
    script = (
        "import torch; from duoserve.kernels.matmul import Products, float_product; torch.set_num_threads(2); "
        f"x_TK, w_NK = torch.randn(400, {shape_NK[1]}), torch.randn{shape_NK}; "
        "made_TN = float_product(x_TK, w_NK, Products.BY_TILE); "
        "alone_TN = torch.cat([float_product(x_K[None], w_NK, Products.BY_TILE) for x_K in x_TK]); "
        "assert torch.equal(made_TN, alone_TN)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
