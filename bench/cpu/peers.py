"""The engines to beat, each in a worker: ``python -m cpu.peers transformers|accelerate``.

Both are fed the tokens that the run's first engine chose, so that every engine routes alike, and do their own argmax
all the same.

E experts, K top-k, L layers, T tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness import Figures, Round, serve
from machine import ForeignCpu, disk_bytes_read, drop_from_page_cache


class Peer:
    """A causal language model of transformers; cold rounds drop ``files`` from the page cache before each token."""

    _model: PreTrainedModel
    _files: Sequence[Path] = ()

    @torch.inference_mode()
    def round(self, prompt: list[int], forced: list[int] | None, new_tokens: int, cold: bool) -> Round:
        """Tokens are fed from ``forced``, or are the engine's own where there are none."""
        figures, foreign = Figures(), ForeignCpu()
        with foreign.measure():
            for seconds, read, token in self._steps(prompt, forced, new_tokens, cold):
                figures.add(seconds, read, token)
        figures.foreign_cpu = foreign.share
        return asdict(figures)

    def _steps(
        self, prompt: list[int], forced: list[int] | None, new_tokens: int, cold: bool
    ) -> Iterator[tuple[float, int, int]]:
        """Per token: seconds and disk bytes of the forward pass and its argmax, and the token chosen."""
        past, fed = None, prompt
        for step in range(new_tokens):
            if cold:
                drop_from_page_cache(self._files)
            read, start = disk_bytes_read(), time.perf_counter()
            out = self._model(torch.tensor([fed]), past_key_values=past, use_cache=True, logits_to_keep=1)
            token = int(out.logits[0, -1].argmax())
            yield time.perf_counter() - start, disk_bytes_read() - read, token
            past, fed = out.past_key_values, [token if forced is None else forced[step]]

    @torch.inference_mode()
    def logits(self, token_ids: list[int], out: str) -> None:
        """Leaves the float32 logits [T, V] of one prefill in the file ``out``."""
        torch.save(self._model(torch.tensor([token_ids]), use_cache=False).logits[0].float(), out)

    def close(self) -> None:
        """Nothing outlives the process."""

    @torch.inference_mode()
    def routing(self, token_ids: list[int]) -> list[list[list[int]]]:
        """The experts that every layer's router chooses, as lists [L][T][K]."""
        out = self._model(torch.tensor([token_ids]), use_cache=False, output_router_logits=True)
        top_k = self._model.config.num_experts_per_tok
        return [logits_TE.topk(top_k, dim=-1).indices.tolist() for logits_TE in out.router_logits]


class Transformers(Peer):
    """All weights in RAM; ``implementation`` is transformers' way to compute the experts."""

    def load(self, folder: str, *, implementation: str, dtype: str = "bfloat16") -> None:
        """From a checkpoint's folder, in whatever dtype."""
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), experts_implementation=implementation
        )


class Accelerate(Peer):
    """transformers with the experts of some layers offloaded to disk by accelerate's hooks.

    At load transformers writes each layer's fused experts as two safetensors files to ``offload``; before a layer's
    experts run, the hook opens them, which maps them, and computing on the chosen experts faults their pages in, with
    the kernel's read-ahead; after it the mapping is gone and the pages stay in the page cache until they are dropped.
    """

    def load(self, folder: str, *, implementation: str, offload: str, resident_layers: int) -> None:
        """The first ``resident_layers`` layers keep their experts in RAM."""
        layers = AutoConfig.from_pretrained(folder).num_hidden_layers
        self._model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            experts_implementation=implementation,
            device_map=_device_map(layers, resident_layers),
            offload_folder=offload,
        )
        self._files = sorted(Path(offload).iterdir())  # not the checkpoint: its dense weights count as resident


def _device_map(layers: int, resident_layers: int) -> dict[str, str]:
    devices = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            devices[f"{prefix}.{name}"] = "cpu"
        devices[f"{prefix}.mlp.experts"] = "cpu" if layer < resident_layers else "disk"
    return devices


ENGINES = {"transformers": Transformers, "accelerate": Accelerate}


if __name__ == "__main__":
    serve(ENGINES[sys.argv[1]])
