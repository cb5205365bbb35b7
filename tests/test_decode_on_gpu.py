"""Recorded decode steps on a GPU: the model's own bits in both modes, and a long random run over poisoned slots.

``STRESS_STEPS`` sets the length of that run, which compute-sanitizer needs short.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duoserve import MoEModel
from duoserve.experts.cuda_streams import CudaStreams
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore, HostStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.kernels.cuda_graphs import CudaRecorder
from duoserve.kv_cache import NewTokens
from duoserve.launching.event import event_steps
from duoserve.launching.graph import graph_steps
from duoserve.launching.launch import StepParts
from duoserve.launching.recorded import RecordedRunner
from duoserve.passes import StepRunner
from duoserve.scheduling.predictor import Predictor
from tests.helpers.assembly import AssembledEngine, assembled
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.lagging import write
from tests.helpers.toys import greedy, toy_prompt
from tests.scheduling.fortune import any_teller

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STRESS_STEPS = int(os.environ.get("STRESS_STEPS", "10000"))
SAID_EVERY = max(1, min(250, STRESS_STEPS // 10))  # steps of that run
EXPERTS = [ExpertId(layer, expert) for layer in range(3) for expert in range(8)]
PROMPTS = [toy_prompt(length) for length in (7, 30, 1)]
MODES = ["event", "graph"]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("decode"), dtype=request.param)


class Progress:
    """Prints now and then how many steps of the long run are done: it may be cut off. bench/gpu_suite.sh reads that."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._said = 0

    def done(self, steps: int, every: int = SAID_EVERY) -> None:
        """``steps`` are done; prints that if they are ``every`` more than when it last did."""
        if steps - self._said >= every:
            self._said = steps
            print(f"stress: {steps} steps in {self._mode} mode", flush=True)


class Gpu:
    """Poisoned slots and pinned experts. ``logits`` are those of all decode steps, ``recorded`` counts the shapes."""

    def __init__(self, record_after: int = 0) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.record_after = record_after
        self.logits: list[Tensor] = []
        self.recorded = 0
        self._open = ExitStack()

    def pool(self, num_slots: int, layout: ExpertLayout) -> SlotPool:
        return SlotPool(num_slots, layout, poison=True, device=self.device)

    def copies(self, store: ExpertStore, pool: SlotPool) -> StreamCopyEngine:
        self.store = HostStore(store, EXPERTS, pinned=True)
        self._open.callback(self.store.close)
        return StreamCopyEngine(self.store, pool, CudaStreams(self.device), pinned=True)

    @contextmanager
    def engine(
        self, folder: Path, slots: int, mode: str, policy: str = "lru", predictor: Predictor | None = None
    ) -> Iterator[AssembledEngine]:
        policy = "resident" if slots == len(EXPERTS) else policy
        runners = {"event": self.event, "graph": self.graph, "model": self.model}
        making = assembled(
            folder,
            policy,
            slots,
            self.copies,
            predictor=predictor,
            make_pool=self.pool,
            make_step_runner=lambda parts: self.noted(runners[mode](parts)),
            device=self.device,
        )
        with self._open:  # the store is closed last
            yield self._open.enter_context(making)

    def model(self, parts: StepParts) -> StepRunner:
        return lambda new_tokens: parts.model(parts.cache.batch(new_tokens)).cpu()

    def event(self, parts: StepParts) -> StepRunner:
        return self.recording(parts, event_steps(parts.model, parts.cache, CudaRecorder(self.device)))

    def graph(self, parts: StepParts) -> StepRunner:
        recorder, books = CudaRecorder(self.device), parts.scheduler.read_through()
        return self.recording(parts, graph_steps(parts.model, parts.cache, recorder, self.store, books))

    def recording(self, parts: StepParts, make_step: Callable[[int, int], StepRunner | None]) -> StepRunner:
        def counted(num_sequences: int, table_width: int) -> StepRunner | None:
            step = make_step(num_sequences, table_width)
            self.recorded += step is not None
            return step

        return RecordedRunner(parts.model, parts.cache, counted, self.record_after)

    def noted(self, decode: StepRunner) -> StepRunner:
        def step(new_tokens: NewTokens) -> Tensor:
            self.logits.append(decode(new_tokens).clone())
            return self.logits[-1]

        return step


@pytest.mark.parametrize("record_after", [0, 3])
@pytest.mark.parametrize("slots", [6, 12, 24])
@pytest.mark.parametrize("mode", MODES)
def test_the_bits_of_the_model_itself(mode: str, slots: int, record_after: int, folder: Path) -> None:
    written, logits = [], []
    for gpu, how in ((Gpu(), "model"), (Gpu(record_after), mode)):
        with gpu.engine(folder, slots, how) as engine:
            written.append([write(engine, PROMPTS, [12, 5, 9]) for _ in range(2)])
        logits.append(gpu.logits)
    assert gpu.recorded == 3
    assert written[0] == written[1] and len(logits[0]) == len(logits[1])
    pairs = zip(*logits, strict=True)
    assert all(torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in pairs)


@pytest.mark.parametrize("policy", ["lookahead", "duoserve"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_predicted_changes_no_bit(mode: str, policy: str, folder: Path) -> None:
    """Somebody who lies on purpose is listened to: between the layers in one mode, between the steps in the other."""
    written, logits, tried = [], [], Gpu()
    for gpu, slots, how, teller in ((Gpu(), 24, "model", None), (tried, 12, mode, any_teller("liar", 3, 2))):
        with gpu.engine(folder, slots, how, policy, teller) as engine:
            written.append(write(engine, PROMPTS, [12, 5, 9]))
            copied = engine.meter.snapshot().bytes
        logits.append(torch.cat(gpu.logits))
    assert tried.recorded == 3 and written[0] == written[1]
    assert torch.equal(*(one.view(torch.int32) for one in logits))
    assert policy != "lookahead" or copied.total > copied.demanded  # others may keep what they have copied


@pytest.mark.parametrize("mode", MODES)
def test_stress(mode: str, tmp_path: Path) -> None:
    """Random prompts in batches of one to four; NaN from a free slot would end the run, other bytes change a token."""
    rng, folder = random.Random(7), save_mixtral(tmp_path, dtype=torch.bfloat16)
    true, tried, progress = Gpu(), Gpu(), Progress(mode)
    with true.engine(folder, 24, "model") as resident, tried.engine(folder, 10, mode) as engine:
        while len(tried.logits) < STRESS_STEPS:
            lengths = rng.sample(range(2, 40), rng.randint(1, 4) if tried.logits else 4)
            prompts = [[rng.randint(1, 95) for _ in range(rng.randint(1, 20))] for _ in lengths]
            assert write(engine, prompts, lengths) == write(resident, prompts, lengths)
            progress.done(len(tried.logits))
    progress.done(len(tried.logits), every=1)
    assert tried.recorded == 4


@pytest.mark.parametrize("mode", MODES)
def test_no_growth(mode: str, folder: Path) -> None:
    """Once its shape is recorded, a sequence takes no more memory of the device.

    The second prompt still gets a workspace of cuBLAS, which recording the first one's steps has let go.
    """
    params = greedy(200)
    with MoEModel.from_pretrained(folder, device="cuda", policy="lru", expert_slots=10, decode_mode=mode) as model:
        first = model.generate(PROMPTS[1], params).token_ids
        assert model.generate(PROMPTS[1], params).token_ids == first
        gc.collect()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        assert model.generate(PROMPTS[1], params).token_ids == first
        gc.collect()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
