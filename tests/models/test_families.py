"""Every family against transformers on checkpoints that transformers saved, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from duoserve import CheckpointError, ConfigError, MoEModel, kernels
from duoserve.experts.checkpoint import Checkpoint
from duoserve.interface import ServiceSettings
from duoserve.models.described import described
from duoserve.models.opened import opened
from duoserve.models.registry import FAMILIES as KNOWN
from duoserve.scheduling.policies import POLICIES
from duoserve.service.async_engine import AsyncEngine
from tests.helpers.checkpoints import reference_logits
from tests.helpers.loops import in_a_loop
from tests.helpers.toys import greedy, toy_prompt
from tests.kernels.common import INTERPRETED
from tests.models.cases import FAMILIES
from tests.models.cases.case import SINGLE, FamilyCases
from tests.models.test_mixtral_parity import check_reference, relative_error

PROMPT = toy_prompt(40)
GREEDY = greedy(64)
STREAMING = tuple(name for name in POLICIES if name != "resident")
ALL = [(model_type, name) for model_type, family in FAMILIES.items() for name in family.cases]


def test_every_family_is_here() -> None:
    assert {family.model_type for family in KNOWN} == FAMILIES.keys() | {"mixtral"}
    assert all(len(family.cases) >= 4 for family in FAMILIES.values())
    assert all({case.hub for case in family.cases.values()} == {True, False} for family in FAMILIES.values())


@pytest.fixture(scope="module", params=ALL, ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, name = request.param
    return FAMILIES[model_type].save(tmp_path_factory.mktemp(model_type), name)


def test_logits_and_greedy_tokens_equal_those_of_transformers(folder: Path) -> None:
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        tokens = model.generate(PROMPT, GREEDY).token_ids
        check_reference(folder, PROMPT, tokens, model.forward(PROMPT + tokens))
    assert len(tokens) == 64


def test_decode_gives_the_logits_of_prefill(folder: Path) -> None:
    """Teacher forcing: the greedy token after every prefix is the argmax of that prefix's last logits."""
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        out = model.generate(PROMPT[:5], GREEDY, max_tokens=20)
        logits_TV = model.forward(PROMPT[:5] + out.token_ids[:-1])
        prompts = [PROMPT[:3], PROMPT[4:20]]
        together = model.generate(prompts, GREEDY, max_tokens=6)
        alone = [model.generate(prompt, GREEDY, max_tokens=6) for prompt in prompts]
    assert logits_TV[4:].argmax(-1).tolist() == out.token_ids
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]


@in_a_loop
async def decoded(model: MoEModel, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens; the 20 likeliest at each place, each with its log-probability: [count, 20, 2]."""
    service = AsyncEngine(model, settings=ServiceSettings(max_batch=1))
    try:
        stream = await service.submit(prompt, replace(GREEDY, max_tokens=count), logprobs=20)
        places = [place for piece in [piece async for piece in stream] for place in piece.logprobs]
    finally:
        await service.close()
    return [place.token_id for place in places], torch.tensor([place.top for place in places])


def test_decode_gives_the_probabilities_of_prefill(folder: Path) -> None:
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        tokens, top_C202 = decoded(model, PROMPT[:5], 20)
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        truth_CV = model.forward(PROMPT[:5] + tokens[:-1])[4:].log_softmax(-1)
    truth_C20 = truth_CV.gather(1, top_C202[..., 0].long())
    assert relative_error(top_C202[..., 1], truth_C20) <= 1e-5


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def hard(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FamilyCases, Path]]:
    family: FamilyCases = request.param
    yield family, family.save(tmp_path_factory.mktemp(family.model_type), family.hard)


def test_bfloat16_is_close(hard: tuple[FamilyCases, Path]) -> None:
    """As close as transformers in bfloat16. Where a rounding turns a token's routing, it and those behind it are far
    off in either, hence the lower quartile.
    """
    _, folder = hard
    true_TV = reference_logits(folder, PROMPT)

    def error(logits_TV: torch.Tensor) -> float:
        return ((logits_TV - true_TV).norm(dim=-1) / true_TV.norm(dim=-1)).quantile(0.25).item()

    with MoEModel.from_pretrained(folder, dtype="bfloat16") as model:
        ours = error(model.forward(PROMPT))
    assert ours <= 1.5 * error(reference_logits(folder, PROMPT, torch.bfloat16))


def test_a_checkpoint_in_bfloat16_means_the_same_in_float32(hard: tuple[FamilyCases, Path], tmp_path: Path) -> None:
    """Also what routers correct their scores by, which is then in bfloat16 too."""
    family, _ = hard
    folder = family.save(tmp_path, family.hard)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        assert relative_error(model.forward(PROMPT), reference_logits(folder, PROMPT)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_say_their_dtype_where_the_config_does_not(dtype: torch.dtype, tmp_path: Path) -> None:
    """As gpt-oss's own config.json does not. An index says nothing of it: bfloat16 is what is published."""
    folder = FAMILIES["gpt_oss"].save(tmp_path, "windows_by_type_shards", dtype)
    config = json.loads((folder / "config.json").read_text())
    for unsaid in ({}, {"dtype": None, "torch_dtype": None}):
        config = {name: config[name] for name in config if "dtype" not in name} | unsaid
        (folder / "config.json").write_text(json.dumps(config))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
        assert described(folder).config.dtype == theirs == dtype
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert described(folder).config.dtype == torch.bfloat16


def test_every_policy_and_slot_count_gives_the_same_bits(hard: tuple[FamilyCases, Path], tmp_path: Path) -> None:
    family, folder = hard
    with MoEModel.from_pretrained(folder, policy="resident") as model:
        assert model.memory.total_experts == family.experts
        tokens = model.generate(PROMPT, GREEDY, max_tokens=12).token_ids
        truth_TV = model.forward(PROMPT + tokens)
    for policy in STREAMING:
        for slots in (family.top_k + 1, family.experts // 2, family.experts):
            with MoEModel.from_pretrained(folder, policy=policy, expert_slots=slots, cache_dir=tmp_path) as model:
                assert model.generate(PROMPT, GREEDY, max_tokens=12).token_ids == tokens, (policy, slots)
                logits_TV = model.forward(PROMPT + tokens)
            assert torch.equal(logits_TV.view(torch.int32), truth_TV.view(torch.int32)), (policy, slots)


def test_every_tensor_that_is_missing_or_of_another_shape_is_named(hard: tuple[FamilyCases, Path]) -> None:
    _, folder = hard
    with opened(folder) as found:
        shapes = found.family.tensor_shapes(found.config)
    checkpoint = Checkpoint.open(folder)
    for name, shape in shapes.items():
        tensors = dict(checkpoint.tensors)
        info = checkpoint.tensors.pop(name)
        with pytest.raises(CheckpointError, match=f"what the model needs: '{name}'"):
            checkpoint.check(shapes, lambda name: True)
        checkpoint.tensors = tensors
        with pytest.raises(CheckpointError, match=f"'{name}' has shape"):
            checkpoint.check(shapes | {name: (*shape, 2)}, lambda name: True)
        assert info.shape == shape
    checkpoint.close()


def test_a_tensor_renamed_or_added_is_refused(hard: tuple[FamilyCases, Path], tmp_path: Path) -> None:
    _, folder = hard
    tensors = load_file(folder / SINGLE)
    with opened(folder) as found:
        name = min(found.family.expert_shapes(found.config))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    renamed = {f"{name}s" if key == name else key: tensor for key, tensor in tensors.items()}
    for changed, named in ((renamed, name), (tensors | {"model.layers.9.odd": torch.ones(2)}, "model.layers.9.odd")):
        save_file(changed, tmp_path / SINGLE)
        with pytest.raises(CheckpointError, match=f"'{named}'"):
            MoEModel.from_pretrained(tmp_path)


REFUSED = [(model_type, name) for model_type, family in FAMILIES.items() for name in family.refused]


@pytest.mark.parametrize(("model_type", "name"), REFUSED, ids=["-".join(pair) for pair in REFUSED])
def test_a_config_with_an_unsupported_value_is_refused_by_name(
    model_type: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The config of the family's first case, changed; it is refused before any tensor is looked at."""
    family = FAMILIES[model_type]
    folder = tmp_path_factory.mktemp(model_type)
    family.save(folder, next(iter(family.cases)))
    changes, message = family.refused[name]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(changes)))
    with pytest.raises(ConfigError, match=message):
        MoEModel.from_pretrained(folder)


@INTERPRETED
@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "gpt_oss"])
def test_the_kernels_agree(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention, groups of experts, half a head rotated, sinks and clamped experts, in Triton's interpreter."""
    family = FAMILIES[model_type]
    folder = family.save(tmp_path, family.hard)
    logits = []
    for triton_on_cpu in (False, True):
        monkeypatch.setattr(kernels, "_TRITON_ON_CPU", triton_on_cpu)
        with MoEModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
            tokens = model.generate(PROMPT[:2], GREEDY, max_tokens=2).token_ids
            logits.append(model.forward(PROMPT[:2] + tokens))
    assert relative_error(logits[1], logits[0]) <= 1e-5
