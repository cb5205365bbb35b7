"""The serving bench without a GPU: its arithmetic and verdicts, the replayed routing, and all of it on small models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench_serve
from duoserve.architecture import LatentAttentionConfig
from duoserve.config import Phase
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.metrics import percentile
from duoserve.scheduling.policies import POLICIES
from duoserve.scheduling.routing import Routing
from duoserve.traces.synthetic import CARDS, synthesize
from serve import figures as serve_figures
from serve import report as serve_report
from serve.cells import BASE, BATCHES, EVENT, GRAPH, PARTS, PROMPTS, SHARES, Cell, cells, shown
from serve.host import CpuHost, GpuHost
from serve.models import MODELS, Unavailable, tiny
from serve.replay import HostArena, RoutingReplay, SharedRows, Tape, TapedScores
from serve.run import Limits, requests_of
from serve.worker import ServeBench
from tests.bench.conftest import Ran
from tests.helpers.listeners import Heard

MIXTRAL, QWEN3, DEEPSEEK = "Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"
CEILINGS = {"link_bytes_per_s": 50e9, "memory_bytes_per_s": 3e12, "flop_per_s": 800e12}


def stats(**figures: float) -> dict[str, Any]:
    zeros = ("ttft_s", "wall_s", "stall_s", "bytes_total", "bytes_wasted", "hits_decode", "misses_decode")
    return dict.fromkeys(zeros, 0) | figures


# A prompt that streamed 50 GB, of which it needed 40, in 1.1 s, then four tokens in 25 ms each: 12 of 16 experts hit, 4
# misses of 1 GB.
MEASURED: dict[str, Any] = {
    "prefill": stats(ttft_s=1.1, wall_s=1.1, stall_s=0.55, bytes_total=50e9),
    "stats": stats(
        ttft_s=1.1, wall_s=1.2, stall_s=0.63, bytes_total=54e9, bytes_wasted=2.7e9, hits_decode=12, misses_decode=4
    )
    | {"itl_s": [0.02, 0.02, 0.02, 0.04]},
    "steps": 4,
    "batch": 1,
    "slot_bytes": 1_000_000_000,
    "needed_bytes": 40e9,
    "asked": 16,
    "as_taped": True,
    "layers": 2,
    "flop": 80e12,
    "dense_active_bytes": 3e9,
    "planned_bytes": 10_000,
    "peak_bytes": 9_000,
    "joules": [0.0, 100.0, 140.0],
    "logits": "a",
    "decoded_logits": "A",
    "timed": None,
    "tokens": [[1, 2, 3, 4, 5]],
    "launch": "model",
    "guesses": "",
    "recorded_while_timed": 0,
}


PAPER = Cell(QWEN3, BASE, "15%")


def part(cell: Cell = PAPER, **changes: Any) -> dict[str, Any]:
    measured = deepcopy(MEASURED) | changes
    row = serve_figures.figures(measured, CEILINGS)
    found = {"name": cell.name, "model": cell.model, "cell": cell.to_dict(), "status": "measured"}
    return found | {"measured": measured, "row": row}


def test_figures_by_hand() -> None:
    row = serve_figures.figures(MEASURED, CEILINGS)
    assert row["ttft_bound_s"] == pytest.approx(0.8)  # 40 GB at 50 GB/s; 80 TFLOP would take 0.1 s
    assert row["prefill_link_share"] == pytest.approx(1 / 1.1) and row["prefill_unneeded_share"] == pytest.approx(0.2)
    assert row["prefill_stall_share"] == pytest.approx(0.5)
    assert (row["tpot_p50_s"], row["tpot_p95_s"]) == (0.02, 0.04)
    assert row["tpot_mean_s"] == pytest.approx(0.025) and row["tok_s"] == pytest.approx(40)
    assert row["tpot_bound_s"] == pytest.approx(0.02)  # a miss of 1 GB a step; 7 GB to read would take 2.3 ms
    assert row["hit_rate"] == 0.75 and row["misses_per_step"] == 1
    assert row["decode_bytes_per_s"] == pytest.approx(40e9) and row["decode_link_share"] == pytest.approx(0.8)
    assert row["decode_stall_share"] == pytest.approx(0.8) and row["wasted_share"] == pytest.approx(0.05)
    assert row["host_s_per_step"] is None and row["joules_per_token"] == pytest.approx(10)


def test_a_prompt_that_computes_longer_than_it_streams_is_bound_by_that() -> None:
    assert part(flop=1600e12)["row"]["ttft_bound_s"] == pytest.approx(2.0)
    resident = part(stats=stats(ttft_s=1.0, wall_s=1.2, hits_decode=16) | {"itl_s": [0.05]})["row"]
    assert resident["tpot_bound_s"] == pytest.approx(7e9 / 3e12)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"logits": "b"}, ["equal logits"]),
        ({"logits": "not finite"}, ["equal logits"]),
        ({"decoded_logits": "B"}, ["equal logits of decode steps"]),
        ({"tokens": [[1, 2, 9]]}, ["equal tokens"]),
        ({"tokens": [[1, 2]]}, []),
        ({"asked": 17}, ["experts asked for"]),
        ({"as_taped": False}, ["experts asked for"]),
        ({"peak_bytes": 10_001}, ["peak memory"]),
        ({"recorded_while_timed": 1}, ["nothing was recorded"]),
    ],
)
def test_checks_bite(changes: dict[str, Any], failing: list[str]) -> None:
    found = serve_figures.checks([part(), part(Cell(QWEN3, "on-demand", "15%"), **changes)])
    names = [check["name"] for check in found if check["passed"] is False]
    assert len(names) == len(failing) and all(n.startswith(f) for n, f in zip(names, failing, strict=True))


def test_what_was_not_compared_is_not_passed() -> None:
    outcomes = {c["name"]: c["passed"] for c in serve_figures.checks([part(peak_bytes=None)])}
    assert list(outcomes.values()) == [None, None, None, True, True, None]


def test_verdicts() -> None:
    peer = {"name": "peer", "model": QWEN3, "status": "measured", "measured": {"ttft_s": 6.0, "itl_s": [0.1, 0.2, 0.3]}}
    found = {t.name: t for t in serve_figures.targets([part(), peer], CEILINGS)}
    assert found[f"{QWEN3}: TTFT / bound, worst of lru"].value == pytest.approx(1.1 / 0.8)
    assert found[f"{QWEN3}: TTFT / bound, worst of lru"].reached is False
    assert found[f"{QWEN3}: the host's time, a layer in event mode"].value is None  # the model itself was launched
    assert found[f"{QWEN3}: TPOT / bound, worst of lru"].value == pytest.approx(1.25)
    assert found[f"{QWEN3}: TTFT, accelerate / lru at 15%"].value == pytest.approx(6 / 1.1)
    end_to_end = (6 + 63 * 0.2) / (1.1 + 63 * 0.025)
    assert found[f"{QWEN3}: end to end, accelerate / lru at 15%"].value == pytest.approx(end_to_end)
    freetoken = "Qwen3-30B-A3B: TPOT / FreeToken's cost model, at this link{}, worst"
    assert found[freetoken.format("")].value == pytest.approx(0.025 / (5.44e-3 + 0.194e-3 * 46.7 / 50))
    fixed = 5.44e-3 + 6.7e9 / 3e12 - 6.7e9 / 1.79e12
    assert found[freetoken.format(" and memory")].value == pytest.approx(0.025 / (fixed + 0.194e-3 * 46.7 / 50))
    launched = [part(replace(PAPER, mode=mode), launch=mode) for mode in (EVENT, GRAPH)]
    launched.append(part(replace(PAPER, format="int4")))
    found = {t.name: t.value for t in serve_figures.targets(launched, CEILINGS)}
    assert found[f"{QWEN3}: TTFT / bound, worst of lru"] is None  # a mode that was asked for is not the engine's choice
    assert found[f"{QWEN3} int4: TTFT / bound, worst of lru"] == pytest.approx(1.1 / 0.8)
    nothing = serve_figures.targets([{"model": QWEN3, "status": "skipped", "cell": {}, "name": ""}], None)
    assert {target.reached for target in nothing} == {None}


def test_the_report_has_the_median_that_is_judged() -> None:
    found = {"ttft_s": 6.0, "itl_s": [1.4, 1.0, 1.3, 1.1], "peak_bytes": None, "moved_bytes": 0}
    peer = {"name": "peer", "model": QWEN3, "status": "measured", "measured": found}
    assert percentile(found["itl_s"], 50) == 1.1
    assert "| 1.1e+03 |" in serve_report.peers({"parts": [peer]})


def test_every_policy_budget_prompt_and_batch_has_its_row() -> None:
    found = {cell for stage in cells() for cell in stage}
    for model in MODELS:
        mine = [cell for cell in found if cell.model == model]
        assert {cell.share for cell in mine if cell.policy == BASE} == set(SHARES)
        assert {cell.policy for cell in mine} == set(POLICIES)
        assert {cell.prompt for cell in mine} == set(PROMPTS) and {cell.batch for cell in mine} == set(BATCHES)
        assert {cell.without for cell in mine} == {"", *PARTS}
        assert GRAPH in {cell.mode for cell in mine}
    assert {cell.format for cell in found if cell.model == QWEN3} == {"bf16", "fp8", "int4"}
    assert len(found) == len([cell for stage in cells() for cell in stage])


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_off_changes_something(name: str) -> None:
    policy, off = Cell(QWEN3, PARTS[name].base, "25%", without=name).switched()
    assert policy != POLICIES[PARTS[name].base] or off.whole_rows or off.pageable


def test_the_tapes_routing_is_what_the_blocks_get() -> None:
    card = CARDS["mixtral-8x7b"]
    trace = synthesize(card, 3, 4, 0.8, seed=1, prompt=5)
    replay = RoutingReplay(Tape.of(trace, (2, 0), torch.device("cpu")), range(card.num_layers))
    asked: list[set[int]] = []
    for step, phase in enumerate([Phase.PREFILL, Phase.DECODE, Phase.DECODE]):
        replay.begin(phase)
        said = [list(trace[number].routing(step)) for number in (2, 0)]
        for layer in range(card.num_layers):
            want = np.concatenate([request[layer].topk_ids_TK for request in said])
            weights_TK, ids_TK = replay.chosen(layer, len(want))
            assert np.array_equal(ids_TK.numpy(), want) and ids_TK.dtype == torch.int64
            assert weights_TK.data_ptr() % 16 == ids_TK.data_ptr() % 16 == 0 or not step
            assert np.array_equal(weights_TK.numpy(), np.concatenate([r[layer].topk_weights_TK for r in said]))
            asked += [set(want.flatten().tolist())] if step else []
    assert Tape.of(trace, (2, 0), torch.device("cpu")).experts(2) == asked


def test_a_listener_hears_the_tapes_scores() -> None:
    trace = synthesize(CARDS["deepseek-v2-lite"], 2, 3, 0.8, seed=1, prompt=5)
    listener = Heard(lookahead=1)
    layers = range(1, 27)  # the model's first layer is dense, so its numbers are not the trace's
    replay = RoutingReplay(Tape.of(trace, (0, 1), torch.device("cpu")), layers)
    told = TapedScores(listener, replay)
    assert told.lookahead == 1
    for step, (phase, rows) in enumerate([(Phase.PREFILL, 10), (Phase.DECODE, 2), (Phase.PREFILL, 3)]):
        requests_T = np.arange(rows)
        told.begin(phase, requests_T)
        replay.begin(phase)
        for layer in layers:
            weights_TK, ids_TK = (chosen.numpy() for chosen in replay.chosen(layer, rows))
            told.routed(Routing(layer, requests_T, ids_TK, weights_TK, {layer + 1: np.zeros((rows, 64))}))
            said = listener.routings[-1][-1]
            assert said.layer == layer and said.requests_T is requests_T and said.topk_ids_TK is ids_TK
        said = [list(trace[number].routing(step % 2)) for number in (0, 1)]
        for routing, *requests in zip(listener.routings[-1], *said, strict=True):
            assert list(routing.ahead) == ([routing.layer + 1] if routing.layer < 26 else [])
            for scores_TE in routing.ahead.values():
                want = np.concatenate([next(iter(request.ahead.values())) for request in requests])[:rows]
                assert np.array_equal(scores_TE, want)
    assert [phase for phase, _ in listener.begun] == [Phase.PREFILL, Phase.DECODE, Phase.PREFILL]


def test_experts_share_the_arenas_rows() -> None:
    layout = ExpertLayout(torch.bfloat16, 64, 32)
    arena = HostArena(3 * layout.slot_bytes + 4096, pinned=False)
    store = SharedRows(arena, layout, num_experts=4)
    assert store.num_rows == 3
    rows = [store.host_row(ExpertId(layer, expert)) for layer in range(2) for expert in range(4)]
    assert torch.equal(rows[0], rows[3]) and not torch.equal(rows[0], rows[1])
    assert bool(torch.isfinite(layout.weights(torch.stack(rows)).w13_SNH).all())
    arena.close()


@pytest.fixture(scope="module")
def bench() -> ServeBench:
    return ServeBench(is_tiny=True, arena_gib=0)


@pytest.mark.parametrize("model", MODELS)
def test_policies_compute_the_same_on_replayed_routing(model: str, bench: ServeBench) -> None:
    chosen = [Cell(model, BASE, "25%"), Cell(model, "on-demand", "15%"), Cell(model, "resident", "100%")]
    chosen.append(Cell(model, BASE, "25%", without="nothing kept"))
    parts = []
    for cell in chosen:
        measured = bench.cell(**cell.to_dict())
        row = serve_figures.figures(measured, bench.ceilings())
        found = {"name": cell.name, "model": model, "cell": cell.to_dict(), "status": "measured"}
        parts.append(found | {"measured": measured, "row": row})
    outcomes = {check["name"].partition(":")[0]: check["passed"] for check in serve_figures.checks(parts)}
    asked = "experts asked for are the tape's"
    timed = "nothing was recorded while it was timed"
    assert outcomes == {
        "equal logits": True,
        "equal logits of decode steps": True,
        "equal tokens": True,
        asked: True,
        timed: True,
        "peak memory / plan": None,
    }
    by_policy = {entry["cell"]["policy"]: entry["row"] for entry in parts[:3]}
    assert by_policy["resident"]["hit_rate"] == 1 and by_policy["on-demand"]["hit_rate"] == 0
    assert by_policy["resident"]["decode_bytes_per_s"] == 0 < by_policy["on-demand"]["decode_bytes_per_s"]


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_experts_in_another_format(form: str, bench: ServeBench) -> None:
    """Fewer bytes, the same routing, numbers that are finite, and the same bits at another budget."""
    plain, *others = (
        bench.cell(**Cell(QWEN3, BASE, share, format=f).to_dict())
        for share, f in (("25%", "bf16"), ("25%", form), ("45%", form))
    )
    assert all(one["slot_bytes"] < plain["slot_bytes"] and one["asked"] == plain["asked"] for one in others)
    assert others[0]["logits"] == others[1]["logits"] != plain["logits"] and others[0]["logits"] != "not finite"


@pytest.mark.parametrize(("prompt", "batch"), [(prompt, batch) for prompt in PROMPTS for batch in BATCHES])
def test_requests_that_warm_up_keep_as_many_pages_as_those_that_are_measured(prompt: int, batch: int) -> None:
    cell, limits = Cell(QWEN3, BASE, "25%", prompt, batch), Limits()
    tokens = [
        [len(one.prompt_ids) + one.params.max_tokens for one in requests_of(cell, used, limits.most + 1, taken)]
        for used, taken in ((limits.to_warm_up(), None), (limits, None), (limits, 1))
    ]
    assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) == batch


def guessed_bytes(measured: dict[str, Any]) -> dict[str, int]:
    """What decode steps copied before it was asked for, by what it was good for."""
    kinds = ("prefetched_useful", "prefetched_late", "wasted")
    return {kind: measured["stats"][f"bytes_{kind}"] - measured["prefill"][f"bytes_{kind}"] for kind in kinds}


def test_a_policy_that_guesses_makes_guesses(bench: ServeBench) -> None:
    """Most of them right, for so are the tape's scores; without guesses nothing is copied ahead."""
    guessing, cut = (Cell(QWEN3, "lookahead", "25%", without=off) for off in ("", "no guesses"))
    made, none = (bench.cell(**cell.to_dict()) for cell in (guessing, cut))
    ahead = guessed_bytes(made)
    print(ahead, guessed_bytes(none))
    assert ahead["prefetched_useful"] + ahead["prefetched_late"] > ahead["wasted"]
    assert made["guesses"] == "lookahead"
    assert none["guesses"] == "" and set(guessed_bytes(none).values()) == {0}


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (Cell(MIXTRAL, BASE, "25%", mode=GRAPH), "takes CUDA graphs"),
        (Cell(MIXTRAL, BASE, "5%"), "raise expert_slots to at least 3"),
        (Cell(MIXTRAL, BASE, "25%", without="pageable host memory"), "no link"),
    ],
)
def test_what_cannot_be_measured_says_why(cell: Cell, why: str, bench: ServeBench) -> None:
    assert why in bench.cell(**cell.to_dict())["unavailable"]


def test_the_tiny_deepseek_has_all_that_the_real_one_has() -> None:
    for model, moe_layers in ((MODELS[DEEPSEEK], 26), (tiny(MODELS[DEEPSEEK]), 2)):
        config = model.wired().config
        assert isinstance(config.blocks.attention, LatentAttentionConfig)
        assert config.moe_layers == tuple(range(1, moe_layers + 1)) and model.card.num_layers == moe_layers
        shared = config.blocks.moe.shared
        assert shared and shared.intermediate_size == 2 * config.expert_intermediate_size
        assert config.blocks.moe.dense_intermediate_size > 0


def test_a_model_without_a_family_says_so() -> None:
    unknown = MODELS[DEEPSEEK].raw | {"model_type": "none_such"}
    model = type(MODELS[MIXTRAL])("none such", unknown, CARDS["mixtral-8x7b"])
    with pytest.raises(Unavailable, match="no family"):
        model.wired()


@pytest.mark.parametrize("model", MODELS)
def test_accelerate_is_measured_beside_it(model: str, bench: ServeBench) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = bench.peer(model=model, prompt=128, steps=2)
    assert found["ttft_s"] > 0 and len(found["itl_s"]) == 2
    small = tiny(MODELS[model]).card.num_layers * MODELS[model].card.num_experts * 3 * 64 * 32 * 2
    assert found["moved_bytes"] == small


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_timeline_of_a_gpu_has_its_kernels() -> None:
    with closing(ServeBench(is_tiny=True, arena_gib=0, host=GpuHost())) as bench:
        found = bench.timeline([cell.to_dict() for cell in shown(MIXTRAL)])
    assert found.get("events", 0) > 50, found.get("unavailable")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", MODELS)
def test_every_cell_on_a_gpu(model: str) -> None:
    with closing(ServeBench(is_tiny=True, arena_gib=0, host=GpuHost())) as bench:
        rates, parts = bench.ceilings(), []
        for cell in (cell for stage in cells([model]) for cell in stage):
            measured = bench.cell(**cell.to_dict())
            if "unavailable" not in measured:
                row = serve_figures.figures(measured, rates)
                assert row["ttft_s"] > 0 and row["tpot_p50_s"] > 0
                found = {"name": cell.name, "model": model, "cell": cell.to_dict(), "status": "measured"}
                parts.append(found | {"measured": measured, "row": row})
    by_mode = {mode: [one["row"] for one in parts if one["cell"]["mode"] == mode] for mode in (EVENT, GRAPH)}
    assert all(row["host_s_per_step"] > row["host_s_per_recorded_step"] > 0 for (row,) in by_mode.values())
    assert len(parts) > 15 and {check["passed"] for check in serve_figures.checks(parts)} == {True}


def test_the_cpu_has_no_figures_of_a_gpu() -> None:
    host = CpuHost()
    assert host.peak_bytes() is None and host.joules() is None and host.facts() is None


def test_the_command(bench_result: Callable[..., Ran]) -> None:
    words = "--tiny", "--models", MIXTRAL
    _, printed, result = bench_result("bench_serve", *words, seconds=900, OMP_NUM_THREADS="1")
    assert {entry["status"] for entry in result["parts"]} == {"measured", "not measured"}
    assert all(check["passed"] is not False for check in result["checks"])
    groups = [check for check in result["checks"] if check["name"].startswith("equal")]
    assert len(groups) == 3 * 6 and all(check["passed"] for check in groups)
    report = serve_report.render(result)
    assert report in printed and "measures nothing" in report and f"{BASE} int4" in report
    assert all(policy in report for policy in POLICIES)
    assert result["timeline"]["status"] == "measured" and "Timeline of a step" in report


def test_a_run_that_is_cut_short_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serve.json"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["bench_serve.py", "--tiny", "--seconds", "0", "--json", str(out)])
    assert bench_serve.main() == 0 and "skipped: the time was up" in capsys.readouterr().out
    assert {entry["status"] for entry in json.loads(out.read_text())["parts"]} == {"skipped"}
    assert len(bench_serve.all_parts(list(MODELS))) == len(json.loads(out.read_text())["parts"])
