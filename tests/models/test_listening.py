"""What a listener hears, and that it is heard by nobody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.config import EngineConfig, Phase
from duoserve.engine import Engine
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.virtual import VirtualClock, VirtualCopyEngine
from duoserve.loading.load import load
from duoserve.models.layers import Linear
from duoserve.models.tap import RouterSite, RoutingTap
from duoserve.request import Request
from tests.helpers.assembly import assembled, tokens_of
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.listeners import Heard
from tests.helpers.toys import greedy

PROMPT = [(7 * i) % 95 + 1 for i in range(20)]
GREEDY = greedy(5)
PREFILL, DECODE = Phase.PREFILL, Phase.DECODE


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("heard"), dtype=request.param)


def copies(store: ExpertStore, pool: SlotPool) -> VirtualCopyEngine:
    return VirtualCopyEngine(VirtualClock(), lambda nbytes: 1e-3, store, pool)


def outcome(folder: Path, listener: Heard | None) -> tuple[list[int], Tensor]:
    with assembled(folder, "lru", 6, copies, listener) as engine:
        tokens = tokens_of(engine, PROMPT, GREEDY)
        return tokens, engine.forward(PROMPT + tokens).view(torch.int32)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_bits_are_those_of_an_unheard_model(folder: Path, lookahead: int) -> None:
    heard = Heard(lookahead)
    tokens, logits_TV = outcome(folder, None)
    assert (tokens, True) == (outcome(folder, heard)[0], torch.equal(outcome(folder, heard)[1], logits_TV))
    assert len(heard.begun) > 2


def test_every_pass_and_every_layer_in_order(folder: Path) -> None:
    heard = Heard(lookahead=2)
    outcome(folder, heard)
    assert [phase for phase, _ in heard.begun] == [PREFILL, *[DECODE] * 4, PREFILL]
    assert [requests for _, requests in heard.begun] == [[0] * 20, *[[0]] * 4, [1] * 25]
    for (_, requests), routings in zip(heard.begun, heard.routings, strict=True):
        assert [routing.layer for routing in routings] == [0, 1, 2]
        assert [sorted(routing.ahead) for routing in routings] == [[1, 2], [2], []]
        for routing in routings:
            assert routing.requests_T.tolist() == requests and routing.requests_T.dtype == np.int64
            assert routing.topk_ids_TK.shape == routing.topk_weights_TK.shape == (len(requests), 2)
            assert (routing.topk_ids_TK.dtype, routing.topk_weights_TK.dtype) == (np.int64, np.float32)
            assert all(s.shape == (len(requests), 8) and s.dtype == np.float32 for s in routing.ahead.values())


def test_rows_of_a_shared_pass_belong_to_their_requests(folder: Path) -> None:
    heard = Heard()

    def serve(engine: Engine) -> None:
        short = greedy(2)
        list(engine.generate([Request(PROMPT[:3], short), Request(PROMPT[:2], GREEDY)]))
        list(engine.generate([Request(PROMPT[:1], short)]))

    with assembled(folder, "lru", 6, copies, heard) as engine:
        serve(engine)
    rows = [requests for _, requests in heard.begun]
    assert rows == [[0, 0, 0, 1, 1], [0, 1], [1], [1], [1], [2], [2]]
    assert all(routing.ahead == {} for routings in heard.routings for routing in routings)


def test_what_is_told_is_what_the_routers_chose(folder: Path) -> None:
    """A decode step chooses as a prefill over the same tokens does; the weights of a token sum to one."""
    heard = Heard()
    tokens, _ = outcome(folder, heard)
    again = heard.routings[-1]
    for layer in range(3):
        steps = [routings[layer] for routings in heard.routings[:-1]]
        ids_TK = np.concatenate([routing.topk_ids_TK for routing in steps])
        assert (ids_TK == again[layer].topk_ids_TK[:24]).mean() > 0.9  # bfloat16 may turn a near-tie
        np.testing.assert_allclose(steps[0].topk_weights_TK.sum(1), 1, atol=1e-6)
    assert len(tokens) == 5


def test_scores_are_the_later_router_on_its_own_norm_of_todays_state() -> None:
    torch.manual_seed(0)
    sites = [RouterSite(layer, Linear(torch.randn(4, 6)), torch.rand(6) + 0.5) for layer in (0, 2, 5)]
    heard = Heard(lookahead=2)
    tap = RoutingTap(heard, sites)
    state_TH = torch.randn(3, 6)
    tap.begin(DECODE, np.array([4, 5, 6]))
    tap.routed(0, F.rms_norm(state_TH, (6,), sites[0].norm_H, 0.0), torch.rand(3, 2), torch.tensor([[0, 1]] * 3))
    ahead = heard.routings[0][0].ahead
    assert sorted(ahead) == [2, 5]
    for site in sites[1:]:
        want_TE = site.logits(F.rms_norm(state_TH, (6,), site.norm_H, 0.0))
        torch.testing.assert_close(torch.from_numpy(ahead[site.layer]), want_TE)


@pytest.mark.parametrize(
    ("norm", "state", "dtype"),
    [
        (0.0, 0.0, torch.float32),
        (0.0, 0.0, torch.float16),
        (1e-6, 0.0, torch.float16),  # whose inverse is infinite
        (1e-6, 1e-6, torch.float16),
    ],
)
def test_a_dead_dimension_says_nothing(norm: float, state: float, dtype: torch.dtype) -> None:
    dead_H, ones_H = torch.tensor([norm, 1.0], dtype=dtype), torch.ones(2, dtype=dtype)
    heard = Heard(lookahead=1)
    logits = Linear(torch.eye(2, dtype=dtype))
    tap = RoutingTap(heard, [RouterSite(0, logits, dead_H), RouterSite(1, logits, ones_H)])
    tap.begin(DECODE, np.array([0]))
    tap.routed(0, torch.tensor([[state, 3.0]], dtype=dtype), torch.ones(1, 1), torch.tensor([[0]]))
    assert heard.routings[0][0].ahead[1].tolist() == [[0.0, 3.0]]


def test_a_loaded_model_can_be_listened_to() -> None:
    heard = Heard(lookahead=1)
    runtime = load("bard", EngineConfig(), "resident", None, heard)
    try:
        runtime.engine.forward([1, 2, 3])
    finally:
        runtime.close()
    assert [routing.layer for routing in heard.routings[0]] == [0, 1, 2, 3, 4, 5]
