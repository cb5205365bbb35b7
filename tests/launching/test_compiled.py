"""Compiled decode steps: the numbers of the model for every family, and the same bits under every policy."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from duoserve import ConfigError, MoEModel
from duoserve.kernels import compiled as compiled_kernels
from duoserve.kernels.compiled import inductor
from duoserve.kernels.compiled.compiler import CpuCompiler
from duoserve.kernels.compiled.inductor import Traced
from duoserve.launching import compiled as compiled_decode
from duoserve.launching.compiled import CompiledStep
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.compiled_case import few_streams, needs_compiler, save
from tests.helpers.toys import greedy, toy_prompt
from tests.models.test_families import decoded
from tests.models.test_mixtral_parity import relative_error

PROMPT = toy_prompt(40)
GREEDY = greedy(20)
# Latent attention, dense first layers and shared experts; sinks, windows and an activation of its own; a gated shared
# expert and biases. What the others add is in the router and in norms, which are traced from the same ops.
TYPES = ("deepseek_v3", "gpt_oss", "qwen2_moe")
UNDER_EVERY_POLICY = ("mixtral", "deepseek_v3")


@pytest.fixture(scope="module", params=("mixtral", *TYPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each compiled step."""
    calls, step = [], CompiledStep.__call__
    monkeypatch.setattr(CompiledStep, "__call__", lambda self, layout: calls.append(1) or step(self, layout))
    return calls


@needs_compiler
def test_a_compiled_step_has_the_probabilities_of_prefill_and_the_same_bits_under_every_policy(
    folder: Path, compiled_calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = next(name for name in ("mixtral", *TYPES) if folder.name.startswith(name))
    if family != "mixtral":
        few_streams(monkeypatch)

    def run(**options: Any) -> tuple[list[int], torch.Tensor]:
        options |= {"dtype": "float32", "decode_mode": "compiled", "cache_dir": tmp_path}
        with MoEModel.from_pretrained(folder, **options) as model:
            return decoded(model, PROMPT[:9], 20)

    tokens, top_C202 = run(policy="resident")
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        truth_CV = model.forward(PROMPT[:9] + tokens[:-1])[8:].log_softmax(-1)
    assert len(compiled_calls) == 19
    assert relative_error(top_C202[..., 1], truth_CV.gather(1, top_C202[..., 0].long())) <= 1e-5
    for policy, slots in (("lru", 9), ("duoserve", "50%")) if family in UNDER_EVERY_POLICY else ():
        other_tokens, other_top = run(policy=policy, expert_slots=slots)
        assert other_tokens == tokens, policy
        assert torch.equal(other_top, top_C202), policy


@needs_compiler
def test_a_context_that_has_grown_long_is_attended_to_by_a_step_of_its_own(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pages: the first is short, the second begins the long step, the third is more of it."""
    monkeypatch.setattr(compiled_decode, "SHORT", 1)
    prompt, widths, make = PROMPT * 3, [], CompiledStep.__init__
    monkeypatch.setattr(CompiledStep, "__init__", lambda self, *parts: make(self, *parts) or widths.append(self.widths))
    with MoEModel.from_pretrained(mixtral, dtype="float32", decode_mode="compiled", max_context=256) as model:
        assert range(2, 5) not in widths
        tokens, top_C202 = decoded(model, prompt[:50], 100)
    with MoEModel.from_pretrained(mixtral, dtype="float32") as model:
        truth_CV = model.forward(prompt[:50] + tokens[:-1])[49:].log_softmax(-1)
    assert range(2, 5) in widths
    assert relative_error(top_C202[..., 1], truth_CV.gather(1, top_C202[..., 0].long())) <= 1e-5


@needs_compiler
@pytest.mark.parametrize("quantize", ["bf12", "int8"])  # int4 takes experts of other sizes: see test_compiled_batches
def test_quantized_experts_give_the_logits_of_the_model(
    quantize: str, tmp_path: Path, compiled_calls: list[int]
) -> None:
    folder = save_mixtral(tmp_path, dtype=torch.bfloat16 if quantize == "bf12" else torch.float32)
    out = []
    for mode in ("auto", "compiled"):
        with MoEModel.from_pretrained(folder, dtype="float32", quantize=quantize, decode_mode=mode) as model:
            out.append(decoded(model, PROMPT, 20))
    (expected, expected_top), (tokens, top) = out
    assert len(compiled_calls) == 19
    assert tokens == expected
    assert relative_error(top, expected_top) <= 1e-5


@needs_compiler
def test_layers_that_differ_in_tensors_only_are_compiled_once(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(Traced, "compiled", lambda self: compiled.append(self) or (lambda *_: None))
    MoEModel.from_pretrained(mixtral, decode_mode="compiled").close()
    # Up to the first choice, from there to the next, to the logits; and an expert, and what is tried before.
    assert len(compiled) == 5


def test_without_a_compiler_a_step_runs_op_by_op(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MoEModel.from_pretrained(mixtral) as model:
        expected, needed = model.generate(PROMPT, GREEDY).token_ids, model.memory
    monkeypatch.setenv("CXX", "no-such-compiler")
    with (
        pytest.warns(UserWarning, match="there is no 'no-such-compiler': decode steps run op by op"),
        MoEModel.from_pretrained(mixtral, decode_mode="compiled", memory=needed.total_bytes) as model,
    ):
        assert model.generate(PROMPT, GREEDY).token_ids == expected
        assert model.memory == needed  # nothing is set aside for compiled steps


@needs_compiler
@pytest.mark.parametrize("quantize", [None, "bf12"])
def test_with_a_compiler_that_fails_all_runs_op_by_op(
    quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Python's headers are missing: Inductor raises what the compiler says."""

    def failing(*_: object, **options: object) -> None:
        raise RuntimeError("Python.h: no such file\ncompilation terminated.")

    folder = save_mixtral(tmp_path, hidden_size=128, intermediate_size=128, dtype=torch.bfloat16)
    with MoEModel.from_pretrained(folder, quantize=quantize) as model:
        expected = model.generate(PROMPT, GREEDY).token_ids
    monkeypatch.setattr(inductor, "InductorCode", failing)
    with (
        pytest.warns(UserWarning, match=r"fails \(Python\.h: no such file\): decode steps run op by op"),
        MoEModel.from_pretrained(folder, quantize=quantize, decode_mode="compiled") as model,
    ):
        assert model.generate(PROMPT, GREEDY).token_ids == expected


@needs_compiler
def test_a_step_that_cannot_be_compiled_later_runs_op_by_op(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the disk has become full: a batch, of which no step had been compiled, and another one behind it."""

    def failing(*_: object) -> None:
        raise OSError("No space left on device")

    with MoEModel.from_pretrained(mixtral) as model:
        expected = [out.token_ids for out in model.generate([PROMPT, PROMPT[:3]], GREEDY)]
    with MoEModel.from_pretrained(mixtral, decode_mode="compiled") as model:
        monkeypatch.setattr(inductor, "InductorCode", failing)
        with pytest.warns(UserWarning, match="of 4 could not be compiled .No space left on device.: such steps run op"):
            assert [out.token_ids for out in model.generate([PROMPT, PROMPT[:3]], GREEDY)] == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [out.token_ids for out in model.generate([PROMPT, PROMPT[:3]], GREEDY)] == expected


@needs_compiler
def test_a_compiler_that_cannot_be_imported_is_done_without(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a process has no place for temporary files, or its user no name."""
    with MoEModel.from_pretrained(mixtral) as model:
        expected = model.generate(PROMPT, GREEDY).token_ids
    monkeypatch.setitem(sys.modules, "duoserve.kernels.compiled.inductor", None)
    monkeypatch.delattr(compiled_kernels, "inductor")
    with pytest.warns(UserWarning, match="PyTorch's compiler cannot be loaded .*: decode steps run op by op"):
        model = MoEModel.from_pretrained(mixtral, decode_mode="compiled")
    with model:
        assert model.generate(PROMPT, GREEDY).token_ids == expected


def test_invariance_cannot_be_compiled() -> None:
    with pytest.raises(ConfigError, match="invariant=True multiplies row by row, which decode_mode"):
        MoEModel.from_pretrained("bard", invariant=True, decode_mode="compiled")


@needs_compiler
def test_work_for_several_numbers_is_compiled_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, source, sums = [], torch.rand(40, 3), torch.zeros(3)
    compiler, compiled = CpuCompiler(), Traced.compiled
    monkeypatch.setattr(Traced, "compiled", lambda self: recorded.append(self) or compiled(self))
    recording = compiler.record_for(lambda number: sums.copy_(source[:number].sum(0)), range(2, 41))
    for number in (2, 3, 7, 40):
        recording.replay(number)
        torch.testing.assert_close(sums, source[:number].sum(0))
    compiler.record_for(lambda number: sums.copy_(source[:number].sum(0)), range(2, 41))
    assert len(recorded) == 1


@needs_compiler
def test_code_for_some_numbers_only_is_replaced_by_that_for_the_largest() -> None:
    mask, out = torch.tensor([1.0] * 5 + [0.0] * 35), torch.zeros(1)

    def masked_sum(number: int) -> None:
        part = mask[:number]
        out.copy_((part * 2 if number > 10 else part).sum() / (2 if number > 10 else 1))

    recording = CpuCompiler().record_for(masked_sum, range(5, 41))
    for number in (5, 10, 11, 40):
        out.zero_()
        recording.replay(number)
        assert out.item() == 5


def test_what_is_recorded_reads_no_values() -> None:
    """An op that did would keep for ever the value that it saw while it was traced."""
    compiler, source = CpuCompiler(), torch.ones(3)
    with pytest.raises(Exception, match=r"[dD]ata.?[dD]ependent"):
        compiler.record(lambda: source * int(source.sum()))
