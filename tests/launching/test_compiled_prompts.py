"""Prompts whose small ops are compiled: the logits of the model for every family, and nothing left to compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duoserve import MoEModel, SamplingParams
from duoserve.kernels.compiled import inductor
from duoserve.loading import load
from tests.helpers.compiled_case import needs_compiler, save
from tests.helpers.toys import toy_prompt
from tests.models.test_mixtral_parity import relative_error

# Also with norms of heads, with latent attention and shared experts, with sinks and another activation.
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
PROMPTS = [toy_prompt(length) for length in (2, 40, 17, 90)]

pytestmark = needs_compiler


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What has been compiled for any number of rows."""
    calls, compile_for_rows = [], inductor.compile_for_rows
    monkeypatch.setattr(inductor, "compile_for_rows", lambda *call: calls.append(call) or compile_for_rows(*call))
    return calls


@pytest.fixture(autouse=True)
def _decode_steps_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own, and take longer to compile."""
    monkeypatch.setattr(load, "make_step_runner", lambda *_: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_the_model_s_and_no_prompt_waits_for_the_compiler(
    family: str, tmp_path: Path, compiled: list[object]
) -> None:
    folder = save(family, tmp_path)
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        expected = [model.forward(prompt) for prompt in PROMPTS]
    assert not compiled
    with MoEModel.from_pretrained(folder, dtype="float32", decode_mode="compiled") as model:
        num_compiled = len(compiled)
        assert num_compiled
        for prompt, logits_TV in zip(PROMPTS, expected, strict=True):
            assert relative_error(model.forward(prompt), logits_TV) <= 1e-5
        model.generate(PROMPTS, SamplingParams(max_tokens=1))
        assert len(compiled) == num_compiled


def test_in_bfloat16_a_prompt_has_its_bits_under_every_policy(tmp_path: Path) -> None:
    """Experts come one by one or all at once: those of few rows are computed with whatever others are there."""
    folder = save("mixtral", tmp_path)
    logits = []
    for policy, slots in (("resident", None), ("on-demand", 4), ("lru", "50%"), ("duoserve", "25%")):
        with MoEModel.from_pretrained(
            folder, dtype="bfloat16", decode_mode="compiled", policy=policy, expert_slots=slots, cache_dir=tmp_path
        ) as model:
            logits.append([model.forward(prompt) for prompt in PROMPTS])
    for other in logits[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, logits[0], strict=True))
