"""``quantize``: experts alone become smaller; the model is the one of the decoded experts, and bard hardly suffers."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duoserve import ConfigError, MoEModel
from duoserve.errors import RequestError
from duoserve.experts.layout import ExpertId
from duoserve.experts.quantizing import QuantizingStore
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertWeights
from duoserve.models.opened import opened
from duoserve.perplexity import OVERLAP, WINDOW, score
from duoserve.text.tokenizer import Tokenizer
from tests.helpers.checkpoints import BARD, reference_greedy, reference_logits, save_mixtral
from tests.helpers.compiled_case import needs_compiler
from tests.helpers.toys import greedy, toy_prompt
from tests.models.cases.quantized import CASES
from tests.models.test_mixtral_parity import relative_error
from tests.test_bard_texts import HELD_OUT

PROMPT = toy_prompt(30)
GREEDY = greedy(32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes, dtypes = {"hidden_size": 64, "intermediate_size": 96}, {"floats": torch.float32, "bfloat16": torch.bfloat16}
    return {name: save_mixtral(tmp_path_factory.mktemp(name), dtype=dtype, **sizes) for name, dtype in dtypes.items()}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["floats"]


def with_decoded_experts(folder: Path, kind: str, out: Path) -> Path:
    """The same checkpoint, in float32, with experts as they are once they have been made ``kind``."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    with opened(folder) as found:
        store = found.expert_store(found.config.dtype, kind)
        for expert in found.experts:
            weights = read(store, expert)
            prefix = f"model.layers.{expert.layer}.block_sparse_moe.experts.{expert.expert}"
            w13_NH = dense(weights.w13, 0)
            for name, w in (("w1", w13_NH[0::2]), ("w3", w13_NH[1::2]), ("w2", dense(weights.w2, 0))):
                assert not torch.equal(tensors[f"{prefix}.{name}.weight"], w)
                tensors[f"{prefix}.{name}.weight"] = w.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nothing_but_the_experts_is_changed(kind: str, folder: Path, tmp_path: Path) -> None:
    plain = with_decoded_experts(folder, kind, tmp_path / "plain")
    with MoEModel.from_pretrained(folder, quantize=kind, dtype="float32") as model:
        assert relative_error(model.forward(PROMPT), reference_logits(plain, PROMPT)) <= 1e-5
        assert model.generate(PROMPT, GREEDY).token_ids == reference_greedy(plain, PROMPT, 32)


@pytest.mark.parametrize("mode", ["auto", pytest.param("compiled", marks=needs_compiler)])
def test_bf12_changes_no_weight_and_nothing_that_is_computed(mode: str, tmp_path: Path) -> None:
    # Compiled, the sizes are those of other tests, whose code is on the disk.
    wide = {"hidden_size": 128, "intermediate_size": 128} if mode == "auto" else {}
    folder = save_mixtral(tmp_path, dtype=torch.bfloat16, **wide)
    found = []
    for kind in (None, "bf12"):
        with MoEModel.from_pretrained(folder, quantize=kind, dtype="float32", decode_mode=mode) as model:
            found.append((model.forward(PROMPT), model.generate(PROMPT, GREEDY).token_ids, model.memory.slot_bytes))
    (before_TV, tokens, floats), (after_TV, same_tokens, smaller) = found
    assert relative_error(after_TV, before_TV) <= 1e-6
    assert tokens == same_tokens == reference_greedy(folder, PROMPT, 32)
    if wide:  # others are mostly padding
        assert smaller < floats / 2  # float32's
    with opened(folder) as opened_model:
        stores = [opened_model.expert_store(torch.bfloat16, quantize) for quantize in (None, "bf12")]
        for expert in opened_model.experts:
            plain, packed = (read(store, expert) for store in stores)
            for ours, w_ND in ((packed.w13, plain.w13_SNH[0]), (packed.w2, plain.w2_SHI[0])):
                assert torch.equal(dense(ours, 0).view(torch.int16), w_ND.view(torch.int16))


def read(store: ExpertStore, expert: ExpertId) -> ExpertWeights:
    row_B = aligned_rows(1, store.layout.slot_bytes)[0]
    store.read(expert, row_B)
    return store.layout.weights(row_B[None])


@pytest.mark.parametrize("kind", ["bf12", "int8", "int4"])
def test_every_policy_and_slot_count_gives_the_same_bits(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["bfloat16" if kind == "bf12" else "floats"]
    with MoEModel.from_pretrained(folder, quantize=kind, policy="resident") as model:
        tokens = model.generate(PROMPT, GREEDY, max_tokens=8).token_ids
        truth_TV = model.forward(PROMPT + tokens)
    for policy, slots, host_memory in (("lru", 3, "auto"), ("duoserve", 12, "200KiB"), ("on-demand", 24, "1GiB")):
        with MoEModel.from_pretrained(
            folder, quantize=kind, policy=policy, expert_slots=slots, host_memory=host_memory, cache_dir=tmp_path
        ) as model:
            assert model.generate(PROMPT, GREEDY, max_tokens=8).token_ids == tokens
            assert torch.equal(model.forward(PROMPT + tokens).view(torch.int32), truth_TV.view(torch.int32))
            slot_bytes = model.memory.slot_bytes
    (pack,) = (tmp_path / "packs").iterdir()
    assert kind in pack.name and (pack / "experts.pack").stat().st_size == 24 * slot_bytes


@pytest.mark.parametrize("host_memory", ["1GiB", "100KiB", "auto"], ids=["ram", "ram_and_disk", "disk"])
@pytest.mark.parametrize("policy", ["on-demand", "layer-prefetch", "duoserve-paper"])
def test_experts_are_quantized_once_even_where_none_stays_in_its_slot(
    policy: str, host_memory: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[ExpertId] = Counter()
    quantize = QuantizingStore.read

    def counted(store: QuantizingStore, expert: ExpertId, row_B: torch.Tensor) -> None:
        made[expert] += 1
        quantize(store, expert, row_B)

    monkeypatch.setattr(QuantizingStore, "read", counted)
    with MoEModel.from_pretrained(
        folder, quantize="int8", policy=policy, expert_slots="100%", host_memory=host_memory, cache_dir=tmp_path
    ) as model:
        model.generate(PROMPT, GREEDY, max_tokens=3)
        assert model.memory.num_slots == 24
    assert len(made) == made.total() == 24


LIMITS = {"int8": (1.002, 1.95), "int4": (1.02, 3.5)}  # bf12, which changes nothing, has a test of its own


@pytest.mark.parametrize("kind", LIMITS)
def test_bard_predicts_a_play_nearly_as_well_as_before(kind: str) -> None:
    """Bits per byte against bfloat16's, and how much smaller an expert is, padding included."""
    tokenizer = Tokenizer.load(BARD)
    assert tokenizer is not None
    ids = [0, *tokenizer.encode(HELD_OUT)]
    found = []
    for quantize in (None, kind):
        with MoEModel.from_pretrained("bard", quantize=quantize) as model:
            found.append((score(model, ids).nats, model.memory.slot_bytes))
    (before, floats), (after, smaller) = found
    worse, less = LIMITS[kind]
    assert before != after <= before * worse
    assert floats / smaller >= less


def test_a_text_is_predicted_window_by_window(folder: Path) -> None:
    """Every token once, whatever the windows, from no fewer tokens before it than the overlap has."""
    ids = [(7 * i * i + 3 * i) % 95 for i in range(WINDOW + 900)]
    passes = []

    class Uniform:
        """Gives the token behind each position four times the weight of any other."""

        def forward(self, token_ids: list[int]) -> torch.Tensor:
            passes.append(token_ids)
            logits_TV = torch.zeros(len(token_ids), 96)
            logits_TV[torch.arange(len(token_ids) - 1), torch.tensor(token_ids[1:])] = torch.tensor(4.0).log()
            return logits_TV

    found = score(Uniform(), ids)
    assert found.tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(99 / 4, rel=1e-6)
    assert found.bits_per_byte(100) == pytest.approx(found.nats / 69.314718, rel=1e-6)
    assert [len(token_ids) for token_ids in passes] == [WINDOW, WINDOW, len(ids) - 2 * (WINDOW - OVERLAP)]
    with pytest.raises(RequestError, match="1 tokens are no text that could be predicted"):
        score(Uniform(), [3])


def test_what_cannot_be_quantized_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantize='int3' is not known: use one of bf12, int8, int4, or None"):
        MoEModel.from_pretrained(folder, quantize="int3")
    odd = save_mixtral(tmp_path / "odd", intermediate_size=24)
    with pytest.raises(ConfigError, match="'int4': no groups of 32, 64 or 128 divide an expert of 32 x 24"):
        MoEModel.from_pretrained(odd, quantize="int4")
    with MoEModel.from_pretrained(odd, quantize="int8") as model:
        model.forward(PROMPT)
    with pytest.raises(ConfigError, match=r"'bf12' keeps the bits of bfloat16, and the checkpoint has torch.float32"):
        MoEModel.from_pretrained(odd, quantize="bf12")
    odd = save_mixtral(tmp_path / "odder", intermediate_size=26, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="'bf12': sizes are multiples of 4 up to 32768, an expert's 32 x 26"):
        MoEModel.from_pretrained(odd, quantize="bf12")
    quantized, _ = CASES["qwen3_moe-awq"].save(tmp_path)
    with pytest.raises(ConfigError, match=r"'int8': the checkpoint is quantized already \(awq int4, groups of 32\)"):
        MoEModel.from_pretrained(quantized, quantize="int8")
