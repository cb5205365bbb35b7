"""What a program sets in torch and NumPy, even on another thread while it loads a model, shows in no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from duoserve import MoEModel, SamplingParams, kernels
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.layout import Quantized
from duoserve.kernels import HostWork, matmul
from duoserve.kernels.weights import ExpertFormat
from duoserve.predictors import training
from duoserve.predictors.files import save_predictor
from duoserve.sampling import Sampler
from duoserve.traces.synthetic import CARDS, synthesize
from tests.experts.test_quantizing import INT4_128, quantized, random_matrix
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.compiled_case import needs_compiler
from tests.helpers.toys import toy_prompt

BF16 = torch.bfloat16
PROMPT = toy_prompt(300)  # more than logits are made for at a time
SAMPLED = SamplingParams(max_tokens=8, seed=3, repetition_penalty=1.2, ignore_eos=True)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(BF16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", BF16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": deterministic_algorithms,
    "errors of numpy": lambda: np.errstate(all="raise"),
}
each_default = pytest.mark.parametrize("default", DEFAULTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def results(folder: Path, prompt: list[int] = PROMPT, **knobs: Any) -> tuple[Tensor, list[list[int]]]:
    with MoEModel.from_pretrained(folder, **({"expert_slots": 8} | knobs)) as model:
        together = model.generate([PROMPT[:20], PROMPT[30:33]], SAMPLED)
        return model.forward(prompt), [done.token_ids for done in together]


def check_same_results(default: str, folder: Path, prompt: list[int] = PROMPT, **options: Any) -> None:
    logits_TV, tokens = results(folder, prompt, **options)
    with DEFAULTS[default]():
        found_TV, found = results(folder, prompt, **options)
    assert found_TV.dtype is torch.float32
    assert torch.equal(found_TV, logits_TV)
    assert found == tokens


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "expert_slots": "100%"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "expert_slots": "100%"},
        {"quantize": "int8"},
        {"quantize": "int8", "expert_slots": "100%"},
    ],
    ids=lambda options: "-".join(options.values()),
)
@each_default
def test_a_model_has_the_same_logits_and_tokens(default: str, options: dict[str, str], folder: Path) -> None:
    check_same_results(default, folder, **options)


@pytest.mark.parametrize("default", ["autocast", "inference mode"])
def test_a_model_is_packed_as_ever(default: str, folder: Path, tmp_path: Path) -> None:
    wanted_TV, _ = results(folder, quantize="int8", cache_dir=tmp_path / "wanted")
    with DEFAULTS[default]():
        found_TV, _ = results(folder, quantize="int8", cache_dir=tmp_path / "found")
    assert torch.equal(found_TV, wanted_TV)


@pytest.mark.parametrize("slots", [8, "100%"])
def test_a_model_that_is_loaded_in_inference_mode_runs_within_it_and_outside(slots: int | str, folder: Path) -> None:
    logits_TV, tokens = results(folder, expert_slots=slots)
    with torch.inference_mode():
        model = MoEModel.from_pretrained(folder, expert_slots=slots)
    with model:
        for mode in (nullcontext, torch.inference_mode, nullcontext):
            with mode():
                together = model.generate([PROMPT[:20], PROMPT[30:33]], SAMPLED)
                assert torch.equal(model.forward(PROMPT), logits_TV)
            assert [done.token_ids for done in together] == tokens


@needs_compiler
@pytest.mark.parametrize("default", ["autocast"])  # each of the others compiles everything again
def test_compiled_steps_stay_as_they_are(default: str, tmp_path: Path) -> None:
    """Of the sizes of other tests, whose code is on the disk."""
    folder = save_mixtral(tmp_path, num_hidden_layers=1)
    check_same_results(default, folder, PROMPT[:250], decode_mode="compiled")


@pytest.mark.parametrize("kind", ["duoserve", "paper", "lookahead"])
@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta", "autocast", "inference mode", "no gradients"])
def test_predictors_are_trained_as_ever(
    default: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LAYER_RECIPE", replace(training.LAYER_RECIPE, epochs=2))
    monkeypatch.setattr(training, "PAPER_RECIPE", replace(training.PAPER_RECIPE, epochs=2, width=16))
    trace = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=2), 4, 20, 0.6, seed=0, prompt=3)
    save_predictor(training.train(trace, kind)[0], tmp_path / "wanted.safetensors", {})
    with DEFAULTS[default]():
        save_predictor(training.train(trace, kind)[0], tmp_path / "found.safetensors", {})
    assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()


@each_default
def test_products_whose_weights_are_widened_stay_as_they_are(default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_native_matmul", lambda dtype: False)
    x_TK, w_NK = torch.randn(20, 48).to(BF16), torch.randn(40, 48).to(BF16)
    wanted_TN = kernels.linear(x_TK, w_NK)
    with DEFAULTS[default]():
        assert torch.equal(kernels.linear(x_TK, w_NK), wanted_TN)


@pytest.mark.parametrize("stored", [INT4_128, Quantized(ExpertFormat.INT8)], ids=["int4", "int8"])
@pytest.mark.parametrize("default", ["float64", "bfloat16"])
def test_quantized_weights_stay_as_they_are(default: str, stored: Quantized) -> None:
    w_ND = random_matrix(3)
    wanted = quantized(w_ND, stored)
    with DEFAULTS[default]():
        found = quantized(w_ND, stored)
    assert torch.equal(found.data_NB, wanted.data_NB)
    assert torch.equal(found.scales_GN, wanted.scales_GN)


@each_default
def test_a_tensor_of_a_checkpoint_is_read_into_host_memory(default: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    stored = torch.randn(6, 9)
    save_file({"a": stored}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with DEFAULTS[default]():
        read, converted = checkpoint.read("a"), checkpoint.read("a", torch.float16)
    checkpoint.close()
    assert torch.equal(read, stored)
    assert torch.equal(converted, stored.half())


@each_default
def test_lists_of_the_host_stay_there(default: str) -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    with DEFAULTS[default]():
        rows_C, work = kernels.context_rows([3, 1], 6, page_tokens=4), HostWork.of([(2, 5)])
        token = Sampler(SamplingParams(temperature=0.0, repetition_penalty=9.0), 3, [2])(logits_V)
    assert isinstance(rows_C, Tensor)
    assert rows_C.tolist() == [12, 13, 14, 15, 4, 5]
    assert [part.tolist() for part in (work.experts_W, work.slots_W, work.count_1)] == [[2], [5], [1]]
    assert token == 1
