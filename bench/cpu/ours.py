"""duoserve as the benches run it, in a worker: ``python -m cpu.ours``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cpu.memory_cap import join, leave
from duoserve import MoEModel, SamplingParams
from duoserve.config import EngineConfig
from duoserve.kernels.compiled.compiler import CpuCompiler, can_compile
from duoserve.kernels.compiled.ops import compiled_ops
from duoserve.loading.load import load
from duoserve.predictors.files import save_predictor
from duoserve.predictors.training import train
from duoserve.request import Request
from duoserve.traces.recorder import TraceRecorder
from duoserve.tracing import RecordingSpec, record
from harness import Figures, Round, serve
from machine import ForeignCpu, disk_bytes_read, drop_from_page_cache, memory_bytes, reset_peak_memory


def load_compiler() -> None:
    """PyTorch's compiler is a library of 200 MB, and loaded before memory is limited."""
    CpuCompiler().record(lambda: (torch.ones(64) + 1,))
    compiled_ops().rms_norm(torch.ones(2, 64), torch.ones(64), 1e-5)


class Duoserve:
    """``MoEModel`` with a policy and a number of slots, timed from outside through its token stream."""

    def __init__(self) -> None:
        self._opened = ExitStack()

    def load(self, folder: str, *, cache: str, cap: str | None = None, **options: Any) -> None:
        """Packs the experts into ``cache`` where they are not yet; ``cap`` is the group to join before that."""
        self._cap = Path(cap) if cap else None
        if self._cap:
            if options.get("decode_mode") == "compiled" and can_compile():
                load_compiler()
            join(self._cap)
        model = MoEModel.from_pretrained(folder, device="cpu", cache_dir=cache, **options)
        self._model = self._opened.enter_context(model)
        self._files = [path for path in Path(cache).rglob("*") if path.is_file()]

    def round(self, prompt: list[int], forced: list[int] | None, new_tokens: int, cold: bool) -> Round:
        """The engine follows its own tokens; whether they equal ``forced`` is for the caller to check."""
        del forced
        if cold:
            drop_from_page_cache(self._files)  # its direct reads leave nothing there, but packing them did
        figures, foreign = Figures(), ForeignCpu()
        with foreign.measure():
            for step, (seconds, read, token) in enumerate(self._steps(prompt, new_tokens)):
                figures.add(seconds, read, token)
                if step == 0:
                    figures.prefill_stats = self._model.stats.to_dict()
        figures.stats = self._model.stats.to_dict()
        figures.foreign_cpu = foreign.share
        return asdict(figures)

    def _steps(self, prompt: list[int], new_tokens: int) -> Iterator[tuple[float, int, int]]:
        """Per token: seconds and disk bytes until its text came out of the stream, and the token."""
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        pieces = self._model.stream(prompt, params)
        for _ in range(new_tokens):
            read, start = disk_bytes_read(), time.perf_counter()
            piece = next(pieces)
            yield time.perf_counter() - start, disk_bytes_read() - read, int(piece)
        if rest := list(pieces):
            raise ValueError(f"{new_tokens} tokens were asked for, and {rest} came on top")

    def logits(self, token_ids: list[int], out: str) -> None:
        """Leaves the float32 logits [T, V] of one prefill in the file ``out``; no round is limited after it."""
        if self._cap:
            leave(self._cap)  # no request has the logits of every token
        torch.save(self._model.forward(token_ids), out)

    def close(self) -> None:
        """Ends the copy threads, which would keep the process alive."""
        self._opened.close()

    def routing(self, folder: str, prompt: list[int], new_tokens: int, cache: str, **options: Any) -> list[Any]:
        """The experts that this engine's decode steps choose, as lists [L][T][K]; loads a model for it."""
        heard = TraceRecorder()
        policy = options.pop("policy")
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        with closing(load(folder, EngineConfig(device="cpu", **options), policy, cache, heard)) as runtime:
            list(runtime.engine.generate([Request(prompt, params)]))
        return [layer.topk_ids_NK[len(prompt) :].tolist() for layer in heard.take().values()]

    def train(self, folder: str, prompts: list[list[int]], new_tokens: int, max_context: int, out: str) -> None:
        """Leaves a predictor in the file ``out``, trained as ``duoserve trace`` and ``train-predictor`` do it."""
        trace = Path(out).with_name("trace.safetensors")
        recording = RecordingSpec(trace, SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))
        wanted = EngineConfig(device="cpu", max_context=max_context)
        predictor, _ = train(record(folder, prompts, recording, wanted, "resident"), "duoserve")
        save_predictor(predictor, Path(out), {})

    def footprint(self, folder: str, prompt: list[int], new_tokens: int, **options: Any) -> dict[str, int]:
        """Bytes by which loading and one request raised this fresh process: its peak, and what stays, anonymous."""
        before = memory_bytes()
        reset_peak_memory()
        self.load(folder, **options)
        self.round(prompt, None, new_tokens, cold=True)
        after = memory_bytes()
        return {"peak": after["peak_rss"] - before["rss"], "anonymous": after["anonymous"] - before["anonymous"]}


if __name__ == "__main__":
    serve(Duoserve)
