"""The process in which cells are served: it keeps the experts' memory and the made-up routing between cells."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from duoserve.predictors.lookahead import LookaheadPredictor
from duoserve.predictors.training import train
from duoserve.traces.synthetic import synthesize
from gpu.moe_shapes import QWEN3
from harness import serve
from serve.cells import PARTS, Cell
from serve.host import CpuHost, GpuHost, Host
from serve.models import MODELS, ServeModel, Unavailable, tiny
from serve.peers import accelerate_offload
from serve.replay import HostArena, Tape
from serve.run import Figures, Ground, KnownLink, Limits, run, trace

IS_TINY, ARENA_GIB = "SERVE_TINY", "SERVE_ARENA_GIB"  # environment of the process
PRECISION = 0.8  # of the made-up look-ahead scores: policies that read these find so many of a token's experts
SEED = 20250907
TRAINING_REQUESTS, TRAINING_STEPS = 8, 32
PAGEABLE_SHARE = 4  # so much less memory for the one cell whose host memory is not page-locked
TINY_ARENA_BYTES = 10 << 20
TINY_PROMPTS = {128: 8, 2048: 24, 8192: 300}
TINY_BATCHES = {1: 1, 4: 2, 12: 3}
TINY_LIMITS = Limits(steps=8, seconds=2.0, timed=2)


class ServeBench:
    """Each method is one part of the bench."""

    def __init__(self, is_tiny: bool, arena_gib: float, host: Host | None = None) -> None:
        self._tiny = is_tiny
        self._limits = TINY_LIMITS if is_tiny else Limits()
        self._arena_bytes = TINY_ARENA_BYTES if is_tiny else int(arena_gib * 2**30)
        self._host: Host = host or (CpuHost() if is_tiny else GpuHost())
        self._arenas: dict[bool, HostArena] = {}
        self._guessers: dict[str, LookaheadPredictor] = {}
        self._links: dict[tuple[str, str], KnownLink] = {}
        self._tapes: dict[tuple[str, int, int], tuple[Tape, Tape]] = {}

    def close(self) -> None:
        """Gives the memory back."""
        for arena in self._arenas.values():
            arena.close()

    def facts(self) -> dict[str, Any]:
        """The device, and how many bytes of host memory the experts share, page-locked or not."""
        arena = self._arena(pageable=False)
        return {"gpu": self._host.facts(), "arena_bytes": len(arena.flat_B), "arena_pinned": arena.pinned}

    def ceilings(self) -> dict[str, float]:
        """Of this machine, in this run."""
        return self._host.ceilings((1 << 20) if self._tiny else QWEN3.layout("bf16").slot_bytes)

    def cell(self, **cell: Any) -> dict[str, Any]:
        """One row of the table; ``unavailable`` says why there is none."""
        return self._unless_unavailable(lambda: self._cell(Cell(**cell)))

    def timeline(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """A decode step of each of ``cells``, of one model. What is measured later in this process may take longer."""
        return self._unless_unavailable(lambda: self._timeline([self._sized(Cell(**cell)) for cell in cells]))

    def peer(self, model: str, prompt: int, steps: int) -> dict[str, Any]:
        """What transformers with accelerate's offloading takes on the same machine."""
        raw, prompt = self._model(model).raw, TINY_PROMPTS[prompt] if self._tiny else prompt
        return self._unless_unavailable(lambda: accelerate_offload(raw, self._host, prompt, steps))

    def _unless_unavailable(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return measure()
        except Unavailable as reason:
            return {"unavailable": str(reason)}

    def _cell(self, cell: Cell) -> Figures:
        cell = self._sized(cell)
        return run(cell, self._ground(cell), self._limits) | {"batch": cell.batch, "prompt": cell.prompt}

    def _timeline(self, cells: list[Cell]) -> Figures:
        return trace(cells, self._ground(cells[0]), self._limits)

    def _sized(self, cell: Cell) -> Cell:
        if not self._tiny:
            return cell
        return replace(cell, prompt=TINY_PROMPTS[cell.prompt], batch=TINY_BATCHES[cell.batch])

    def _ground(self, cell: Cell) -> Ground:
        model = self._model(cell.model)
        pageable = cell.without in PARTS and PARTS[cell.without].pageable
        if pageable and not self._host.pins:
            raise Unavailable("there is no link that page-locked memory would be better for")
        link = self._links.setdefault((model.name, cell.format), KnownLink())
        tapes, guesser = self._tapes_of(model, cell, self._limits), self._guesser(model)
        return Ground(self._host, model.wired(cell.format), link, self._arena(pageable), *tapes, guesser)

    def _model(self, name: str) -> ServeModel:
        return tiny(MODELS[name]) if self._tiny else MODELS[name]

    def _arena(self, pageable: bool) -> HostArena:
        if pageable not in self._arenas:
            nbytes = self._arena_bytes // (PAGEABLE_SHARE if pageable else 1)
            self._arenas[pageable] = HostArena(nbytes, pinned=self._host.pins and not pageable)
        return self._arenas[pageable]

    def _guesser(self, model: ServeModel) -> LookaheadPredictor:
        """Trained on other requests whose look-ahead scores are as good as the tape's."""
        if model.name not in self._guessers:
            trace = synthesize(model.card, TRAINING_REQUESTS, TRAINING_STEPS, PRECISION, SEED + 1)
            trained, _ = train(trace, LookaheadPredictor.name)
            assert isinstance(trained, LookaheadPredictor)
            self._guessers[model.name] = trained
        return self._guessers[model.name]

    def _tapes_of(self, model: ServeModel, cell: Cell, limits: Limits) -> tuple[Tape, Tape]:
        """The routing of the requests that warm up and of those that are measured; kept for one group at a time."""
        key = (model.name, cell.prompt, cell.batch)
        if key not in self._tapes:
            self._tapes.clear()
            requests, steps = 2 * cell.batch, limits.most + 1
            trace = synthesize(model.card, requests, steps, PRECISION, SEED, prompt=cell.prompt)
            numbers = range(cell.batch), range(cell.batch, requests)
            self._tapes[key] = tuple(Tape.of(trace, chosen, self._host.device) for chosen in numbers)
        return self._tapes[key]


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(lambda: ServeBench(os.environ[IS_TINY] == "1", float(os.environ[ARENA_GIB])))
