"""GGUF files of the bench: what an independent reader finds and computes, and what rounding to q8_0 and q4_0 costs.

T tokens, H hidden, D of a head, V vocabulary.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from cpu import gguf_mixtral
from cpu.gguf_file import Entry, Kind, q4_0, q8_0, write
from tests.helpers.checkpoints import reference_logits, save_mixtral
from tests.helpers.gguf_reader import BF16, F32, Q4_0, Q8_0, GgufFile, read_gguf

LAYERS, HEADS, KV_HEADS, TOP_K = 3, 4, 2, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"), dtype=torch.bfloat16, intermediate_size=64)


@pytest.fixture(scope="module", params=list(gguf_mixtral.FILE_TYPES), ids=lambda kind: kind.name)
def converted(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[Kind, GgufFile]:
    out = checkpoint / f"{request.param.name}.gguf"
    gguf_mixtral.convert(checkpoint, out, request.param)
    return request.param, read_gguf(out)


def llama_logits(file: GgufFile, token_ids: list[int]) -> torch.Tensor:
    """Float32 logits [T, V] as llama.cpp's architecture "llama" computes them from a file of that kind."""
    weights = {name: torch.from_numpy(array.copy()) for name, (_, array) in file.tensors.items()}

    def normed(x_TH: torch.Tensor, name: str) -> torch.Tensor:
        epsilon = file.metadata["llama.attention.layer_norm_rms_epsilon"]
        return F.rms_norm(x_TH, x_TH.shape[-1:], weights[f"{name}.weight"], epsilon)

    x_TH = weights["token_embd.weight"][token_ids]
    for layer in range(file.metadata["llama.block_count"]):
        block = {
            name.removeprefix(f"blk.{layer}."): w for name, w in weights.items() if name.startswith(f"blk.{layer}.")
        }
        x_TH = x_TH + attention(file, block, normed(x_TH, f"blk.{layer}.attn_norm"))
        x_TH = x_TH + experts(file, block, normed(x_TH, f"blk.{layer}.ffn_norm"))
    return normed(x_TH, "output_norm") @ weights["output.weight"].T


def attention(file: GgufFile, block: dict[str, torch.Tensor], x_TH: torch.Tensor) -> torch.Tensor:
    heads, kv_heads = file.metadata["llama.attention.head_count"], file.metadata["llama.attention.head_count_kv"]
    q, k, v = ((x_TH @ block[f"attn_{name}.weight"].T).unflatten(1, (n, -1)).transpose(0, 1)
               for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)))  # fmt: skip
    q, k = (rotated(x, file.metadata["llama.rope.freq_base"]) for x in (q, k))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(0, 1).flatten(1) @ block["attn_output.weight"].T


def rotated(x_NTD: torch.Tensor, base: float) -> torch.Tensor:
    """Neighbours are turned as pairs."""
    tokens, size = x_NTD.shape[1:]
    angles = torch.arange(tokens)[:, None] * base ** (-torch.arange(0, size, 2) / size)
    turned = torch.view_as_complex(x_NTD.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(()), angles)
    return torch.view_as_real(turned).flatten(-2)


def experts(file: GgufFile, block: dict[str, torch.Tensor], x_TH: torch.Tensor) -> torch.Tensor:
    chances, chosen = (x_TH @ block["ffn_gate_inp.weight"].T).softmax(-1).topk(file.metadata["llama.expert_used_count"])
    out_TH = torch.zeros_like(x_TH)
    for token, (shares, ids) in enumerate(zip(chances / chances.sum(-1, keepdim=True), chosen.tolist(), strict=True)):
        for share, expert in zip(shares, ids, strict=True):
            gate, up, down = (block[f"ffn_{name}_exps.weight"][expert] for name in ("gate", "up", "down"))
            out_TH[token] += share * (down @ (F.silu(gate @ x_TH[token]) * (up @ x_TH[token])))
    return out_TH


def as_rounded(checkpoint: Path, folder: Path, kind: Kind) -> Path:
    """The same checkpoint, in float32, with every matrix but the routers as blocks of ``kind`` have it."""
    through = through_q8_0 if kind is Kind.Q8_0 else through_q4_0
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name for name in tensors if "norm" in name or name.endswith("gate.weight")}
    rounded = {name: w.float() if name in kept else through(w.float()) for name, w in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def through_q8_0(w: torch.Tensor) -> torch.Tensor:
    blocks = w.reshape(-1, 32)  # in float32, as the format's authors compute it: it decides ties
    scales = blocks.abs().amax(1, keepdim=True) / 127
    codes = torch.sign(blocks) * (blocks.abs() / scales + 0.5).floor()
    return (codes * scales.half().float()).view(w.shape)


def through_q4_0(w: torch.Tensor) -> torch.Tensor:
    blocks = w.reshape(-1, 32)
    largest = torch.tensor([[max(block, key=abs)] for block in blocks.tolist()])  # of several the first
    scales = largest / -8
    codes = (blocks / scales + 8.5).floor().clamp(0, 15) - 8
    return (codes * scales.half().float()).view(w.shape)


def test_a_file_is_computed_to_transformers_logits(
    converted: tuple[Kind, GgufFile], checkpoint: Path, tmp_path: Path
) -> None:
    kind, file = converted
    token_ids = [5, 17, 3, 88, 41, 5, 60, 2]
    expected_TV = reference_logits(
        checkpoint if kind is Kind.BF16 else as_rounded(checkpoint, tmp_path / "rounded", kind), token_ids
    )
    errors_T = (llama_logits(file, token_ids) - expected_TV).norm(dim=-1) / expected_TV.norm(dim=-1)
    assert errors_T.max() < 1e-4


def test_kinds_shapes_and_order(converted: tuple[Kind, GgufFile], checkpoint: Path) -> None:
    kind, file = converted
    source = load_file(checkpoint / "model.safetensors")
    assert len(file.tensors) == 3 + LAYERS * 10
    for name, (stored, array) in file.tensors.items():
        is_float = "norm" in name or "gate_inp" in name
        assert stored == (F32 if is_float else {Kind.BF16: BF16, Kind.Q8_0: Q8_0, Kind.Q4_0: Q4_0}[kind]), name
        assert array.size and np.isfinite(array).all()
    down = file.tensors["blk.1.ffn_down_exps.weight"][1]
    expert = source["model.layers.1.block_sparse_moe.experts.6.w2.weight"].float().numpy()
    assert down.shape == (8, *expert.shape)
    assert (
        np.abs(down[6] - expert).max()
        <= np.abs(expert).max() * {Kind.BF16: 0, Kind.Q8_0: 1 / 127, Kind.Q4_0: 1 / 8}[kind]
    )


def test_metadata(converted: tuple[Kind, GgufFile]) -> None:
    kind, file = converted
    found = file.metadata
    assert file.version == 3 and found["general.architecture"] == "llama"
    assert found["general.file_type"] == {Kind.BF16: 32, Kind.Q8_0: 7, Kind.Q4_0: 2}[kind]
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (HEADS, KV_HEADS)
    assert (found["llama.expert_count"], found["llama.expert_used_count"]) == (8, TOP_K)
    assert found["llama.rope.freq_base"] == 10000.0
    assert len({len(found[f"tokenizer.ggml.{what}"]) for what in ("tokens", "scores", "token_type")}) == 1
    assert found["tokenizer.ggml.tokens"][17] == "\u258117" and len(found["tokenizer.ggml.tokens"]) == 96


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_q8_0_is_off_by_half_a_step_at_most(scale: float, tmp_path: Path) -> None:
    weights = scale * torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    weights[2, 32:64] = 0.0
    write(tmp_path / "w.gguf", {"general.architecture": "llama"}, [Entry("w", (5, 96), Kind.Q8_0, lambda: weights)])
    found = torch.from_numpy(read_gguf(tmp_path / "w.gguf").tensors["w"][1].copy())
    largest = weights.reshape(-1, 32).abs().amax(1).repeat_interleave(32).reshape(5, 96)
    # half a step, and what float16 may take from the scale: 2^-11 of it, or half its smallest step, times 127
    allowed = largest / 127 / 2 + largest * 2**-11 + 127 * 2**-25
    assert ((found - weights).abs() <= allowed).all()
    assert (found[2, 32:64] == 0).all()


def test_q8_0_of_known_weights() -> None:
    weights = torch.zeros(1, 32)
    weights[0, :4] = torch.tensor([127.0, -127.0, 1.5, -0.5])  # the scale is 1; halves go away from zero
    data = q8_0(weights)
    assert np.frombuffer(data, "<f2", 1)[0] == 1.0
    assert np.frombuffer(data, "i1", 5, 2).tolist() == [127, -127, 2, -1, 0]
    assert len(data) == 34


def test_q4_0_of_known_weights() -> None:
    weights = torch.zeros(1, 32)
    weights[0, :3], weights[0, 16:19] = torch.tensor([-8.0, 8.0, 2.5]), torch.tensor([1.0, -2.6, 6.0])  # the scale is 1
    data = q4_0(weights)
    assert np.frombuffer(data, "<f2", 1)[0] == 1.0
    low, high = (0, 15, 11), (9, 5, 14)  # half goes up, and 8 is one more than there are codes for
    assert np.frombuffer(data, "u1", 4, 2).tolist() == [a | b << 4 for a, b in zip((*low, 8), (*high, 8), strict=True)]
    assert len(data) == 18
    assert np.frombuffer(q4_0(-weights), "<f2", 1)[0] == -1.0  # of -8 and 8 the first counts


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for quantized in (q8_0, q4_0):
        with pytest.raises(ValueError, match="48 weights"):
            quantized(torch.zeros(2, 48))
    with pytest.raises(ValueError, match=r"w is \(4, 32\), not \(32, 4\)"):
        write(tmp_path / "w.gguf", {}, [Entry("w", (32, 4), Kind.F32, lambda: torch.zeros(4, 32))])


def test_a_conversion_that_fails_leaves_no_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = checkpoint / "new.gguf"
    monkeypatch.setattr(gguf_mixtral, "pairs_together", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gguf_mixtral.convert(checkpoint, out, Kind.BF16)
    assert not out.exists()
