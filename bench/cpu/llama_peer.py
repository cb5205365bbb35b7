"""llama.cpp as the benches run it, by the package xllamacpp, in a worker: ``python -m cpu.llama_peer``.

Its server runs in this process and streams; it cannot be fed tokens as it decodes, so rounds follow its own choice, and
``logits`` feeds it the run's tokens one request each, behind a cached prompt, as decode steps of their own.

T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xllamacpp

from cpu.gguf_file import Kind
from cpu.gguf_mixtral import convert
from cpu.memory_cap import join
from harness import Figures, Round, serve
from machine import ForeignCpu, disk_bytes_read, drop_from_page_cache

GREEDY = {"temperature": 0.0, "ignore_eos": True}


class LlamaCpp:
    """One model in one server with one slot; the threads are torch's number."""

    def load(self, folder: str, *, gguf: str, kind: str, max_context: int, cap: str | None = None) -> None:
        """Converts the checkpoint to ``gguf`` where it is not yet. ``cap``: the group to join, for a mapped, cold file.

        Else weights are read into memory, where llama.cpp may repack them.
        """
        config = json.loads((Path(folder) / "config.json").read_text())
        self._vocab, self._prompt_tokens = config["vocab_size"], 0
        convert(Path(folder), Path(gguf), Kind[kind.upper()])
        if cap:
            drop_from_page_cache([Path(gguf)])  # what it maps later is then counted in its group
            join(Path(cap))
        modes = xllamacpp.llama_load_mode
        mode = modes.LLAMA_LOAD_MODE_MMAP if cap else modes.LLAMA_LOAD_MODE_NONE
        self._server = xllamacpp.Server(_parameters(gguf, max_context, mode))

    def round(self, prompt: list[int], forced: list[int] | None, new_tokens: int, cold: bool) -> Round:
        """The engine follows its own tokens; ``cold`` it is by its group's limit."""
        del forced, cold
        self._prompt_tokens = len(prompt)
        figures, foreign = Figures(), ForeignCpu()
        with foreign.measure():
            for seconds, read, token in self._steps(prompt, new_tokens):
                figures.add(seconds, read, token)
        figures.foreign_cpu = foreign.share
        return asdict(figures)

    def _steps(self, prompt: list[int], new_tokens: int) -> list[tuple[float, int, int]]:
        """Per token: seconds and disk bytes until its text came out of the stream, and the token."""
        seen = [(time.perf_counter(), disk_bytes_read(), "")]

        def on_chunk(chunk: dict[str, Any]) -> bool:
            if "choices" not in chunk:
                raise RuntimeError(f"llama.cpp says {chunk}")
            if text := chunk["choices"][0]["text"]:
                seen.append((time.perf_counter(), disk_bytes_read(), text))
            return False  # True would end the request

        asked = {"prompt": prompt, "n_predict": new_tokens, "stream": True, "cache_prompt": False, **GREEDY}
        self._server.handle_completions(asked, on_chunk)
        if len(seen) != new_tokens + 1:
            raise RuntimeError(f"{new_tokens} tokens were asked for, and {len(seen) - 1} came")
        return [(at - before, read - so_far, int(text)) for (before, so_far, _), (at, read, text) in pairwise(seen)]

    def logits(self, token_ids: list[int], out: str) -> None:
        """Leaves the log-probabilities [T, V] of what may follow the prompt and each token behind it in ``out``."""
        lengths = range(self._prompt_tokens, len(token_ids) + 1)
        torch.save(torch.stack([self._log_probabilities_V(token_ids[:length]) for length in lengths]), out)

    def _log_probabilities_V(self, token_ids: list[int]) -> torch.Tensor:
        asked = {"prompt": token_ids, "n_predict": 1, "logprobs": self._vocab, "cache_prompt": True, **GREEDY}
        answer = self._server.handle_completions(asked)
        [said] = answer["choices"][0]["logprobs"]["content"]
        found_V = torch.full((self._vocab,), torch.nan)
        for candidate in said["top_logprobs"]:
            found_V[candidate["id"]] = candidate["logprob"]
        return found_V

    def close(self) -> None:
        """Nothing outlives the process."""


def _parameters(gguf: str, max_context: int, mode: Any) -> Any:
    """llama.cpp's defaults but for threads, context, one request at a time, and no cache of past prompts in RAM."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf
    parameters.n_ctx = max_context
    parameters.n_parallel = 1
    parameters.load_mode = mode
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.cache_ram_mib = 0
    parameters.ui = False
    parameters.verbosity = 1
    return parameters


if __name__ == "__main__":
    serve(LlamaCpp)
