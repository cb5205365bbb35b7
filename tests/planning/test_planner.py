"""Plans: the memory that loading would take, what a plan answers, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from duoserve import MoEModel
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.planning.model_cards import find_model
from duoserve.planning.planner import Plan, Planner
from duoserve.planning.policy_speed import Question
from duoserve.replaying.hardware import GIB, Hardware, find_hardware
from tests.helpers.checkpoints import save_mixtral
from tests.models.cases.quantized import CASES

CPU = Hardware("cpu", 10e9, 20e9, 1e11, 1e-4, 1e-3, host_computes=True, memory_bytes=8 * GIB, host_bytes=0, disk=1e9)


def planner_of(name: str) -> Planner:
    return Planner(name, find_model(name))


def plan(name: str, hardware: str, **asked: object) -> Plan:
    return planner_of(name).plan(find_hardware(hardware), Question(**asked))


@pytest.mark.parametrize(
    ("model", "asked", "loaded"),
    [
        ("bard", {"expert_slots": "25%"}, {"expert_slots": "25%"}),
        ("bard-fine", {"expert_slots": "25%"}, {"expert_slots": "25%"}),
        ("bard", {"memory": 64 << 20}, {"memory": "64MiB"}),
        ("bard-fine", {"memory": 64 << 20}, {"memory": "64MiB"}),
        ("bard", {"expert_slots": 24, "form": "int4"}, {"expert_slots": 24, "quantize": "int4"}),
        ("bard", {"expert_slots": 24, "form": "int8"}, {"expert_slots": 24, "quantize": "int8"}),
        ("bard-fine", {"expert_slots": 24, "host_memory": 1 << 20}, {"expert_slots": 24, "host_memory": "1MiB"}),
    ],
)
def test_memory_is_what_loading_takes(model: str, asked: dict, loaded: dict, tmp_path) -> None:
    question = Question(prompt=64, new_tokens=64, max_context=192, **asked)
    with MoEModel.from_pretrained(model, device="cpu", max_context=192, cache_dir=tmp_path, **loaded) as running:
        assert planner_of(model).plan(CPU, question).memory == running.memory


def test_a_float32_checkpoint_too(tmp_path) -> None:
    folder = save_mixtral(tmp_path)
    question = Question(prompt=8, new_tokens=8, max_context=64, expert_slots=6)
    with MoEModel.from_pretrained(folder, device="cpu", max_context=64, expert_slots=6) as running:
        assert Planner("small", find_model(folder)).plan(CPU, question).memory == running.memory


def test_mixtral_in_int4_on_a_4090() -> None:
    found = plan("mixtral-8x7b", "rtx4090", form="int4")
    assert 0.5 < found.memory.share < 0.8
    assert found.memory.total_bytes <= 0.8 * 24 * GIB
    assert list(found.speeds)[:2] == ["duoserve", "lru"]
    assert found.speeds.keys() == {"duoserve", "lru", "on-demand", "layer-prefetch"}
    assert (found.best.policy, found.best.tpot.bound) == ("duoserve", "link")
    # FIGURES: 0.96 s to stream all experts at 25 GB/s, and 240 ms a token without reuse.
    assert found.best.first_ttft_s == pytest.approx(0.96, rel=0.05)
    assert found.speeds["on-demand"].tpot.total == pytest.approx(0.240, rel=0.05)


def test_what_fits_is_resident() -> None:
    found = plan("mixtral-8x7b", "h100", form="int4")
    assert list(found.speeds) == ["resident"]
    assert found.best.tpot.bound == "memory"
    assert planner_of("mixtral-8x7b").one_gib_more(found) is None


def test_a_gib_more_buys_slots_and_int4_buys_more() -> None:
    planner = planner_of("qwen3-30b-a3b")
    found = plan("qwen3-30b-a3b", "rtx4090")
    more, smaller = planner.one_gib_more(found), planner.in_int4(found)
    assert more is not None and smaller is not None
    assert more.memory.num_slots - found.memory.num_slots == GIB // found.memory.slot_bytes
    assert smaller.best.tpot.total < more.best.tpot.total < found.best.tpot.total
    assert planner.in_int4(smaller) is None


def test_a_longer_context_leaves_fewer_slots_and_takes_longer() -> None:
    short, long = (plan("qwen3-30b-a3b", "rtx4090", prompt=n, batch=b) for n, b in ((512, 1), (8192, 4)))
    assert long.memory.num_slots < short.memory.num_slots
    assert long.best.ttft.total > short.best.ttft.total
    assert long.best.tpot.total > short.best.tpot.total


def test_each_sequence_of_a_batch_has_whole_pages() -> None:
    """150 tokens each lie in three pages of 64."""
    asked = {"prompt": 100, "new_tokens": 50, "batch": 32}
    found, one = plan("qwen3-30b-a3b", "rtx4090", **asked), plan("qwen3-30b-a3b", "rtx4090", max_context=6144)
    assert found.memory.kv_bytes == one.memory.kv_bytes == 32 * 192 * (48 * 2 * 4 * 128 * 2)
    assert plan("qwen3-30b-a3b", "rtx4090", max_context=6144 - 63, **asked).memory == found.memory  # rounded up
    with pytest.raises(ConfigError, match=r"max_context=4800 holds fewer tokens than 32 x 150 .* at least 6144"):
        plan("qwen3-30b-a3b", "rtx4090", max_context=4800, **asked)


def test_more_ram_than_a_card_is_assumed_to_have_may_be_named_but_not_more_than_was_found() -> None:
    planner, question = planner_of("mixtral-8x22b"), Question(host_memory=90 * GIB)
    assert planner.plan(find_hardware("rtx4090"), question).memory.host_bytes > 64 * GIB
    for name in ("this", "this@pcie4x8"):
        found = replace(find_hardware("rtx4090"), name=name)
        with pytest.raises(MemoryBudgetError, match=r"but 68719476736 bytes .* of RAM are free"):
            planner.plan(found, question)
        assert planner.plan(found, replace(question, host_memory=60 * GIB)).memory.host_bytes > 59 * GIB


def test_prompts_of_a_batch_use_more_experts_than_one_and_take_longer() -> None:
    one, four = (plan("qwen3-30b-a3b", "rtx4090", prompt=64, batch=batch).best.ttft for batch in (1, 4))
    assert 1.2 * one.busy["link"] < four.busy["link"] < 4 * one.busy["link"]


def test_experts_beyond_ram_come_from_the_disk() -> None:
    planner, question = planner_of("deepseek-v3"), Question(form="int4")
    a100 = replace(find_hardware("a100-80"), host_bytes=128 * GIB)
    found = planner.plan(a100, question)
    assert found.memory.host_bytes <= 0.8 * 128 * GIB < found.memory.total_experts * found.memory.slot_bytes
    assert found.best.tpot.bound == "disk"
    roomy = planner.plan(replace(a100, host_bytes=2048 * GIB), question)
    assert roomy.best.tpot.bound == "link"
    assert roomy.best.tpot.total < found.best.tpot.total / 2
    slower = planner.plan(replace(a100, disk=a100.disk / 2), question)
    assert slower.best.tpot.total > 1.5 * found.best.tpot.total


def test_what_cannot_run_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(MemoryBudgetError, match=r"GPU memory must be free \(39\.96 GiB: 9 slots x .* dense weights"):
        plan("deepseek-v3", "rtx5090")
    with pytest.raises(MemoryBudgetError, match=r"memory=4294967296 bytes .* raise memory to at least"):
        plan("mixtral-8x7b", "rtx4090", memory=4 * GIB)
    with pytest.raises(ConfigError, match="100000 tokens and 256 new ones are more than the 32768 positions"):
        plan("mixtral-8x7b", "rtx4090", prompt=100_000)
    with pytest.raises(ConfigError, match="max_context=512 holds fewer tokens than 2 x 768"):
        plan("mixtral-8x7b", "rtx4090", batch=2, max_context=512)


def test_what_no_gpu_runs_yet_is_said(tmp_path: Path) -> None:
    ordered, _ = CASES["qwen3_moe-gptq-ordered"].save(tmp_path)
    asked = Question(prompt=8, new_tokens=8, max_context=64, expert_slots=8)
    notes = Planner("ordered", find_model(ordered)).plan(find_hardware("rtx4090"), asked).notes
    assert any("ordered by activation on CPUs only so far" in note for note in notes)


def test_what_is_assumed_is_said() -> None:
    notes = "\n".join(plan("gpt-oss-120b", "rtx4090").notes)
    assert "CPUs only" not in notes
    assert "64.00 GiB of RAM" in notes
    assert "hit rates" not in notes
    assert "hit rates are those of mixtral-8x7b (8 experts, top-2)" in plan("mixtral-8x22b", "h200").notes[0]
    assert "so few as here miss more" in plan("qwen3-30b-a3b", "rtx4090", new_tokens=32).notes[0]
    assert planner_of("bard").plan(CPU, Question(max_context=2048)).notes == ()
    by_chance = planner_of("bard").plan(CPU, Question(max_context=2048, new_tokens=32, routing="uniform"))
    assert by_chance.notes == (
        "hit rates are those of chance: every expert as likely as any other, whatever came before",
    )
    by_another = planner_of("bard").plan(CPU, Question(max_context=2048, routing="qwen3-30b-a3b"))
    assert by_another.notes == ("hit rates are those of qwen3-30b-a3b (128 experts, top-8); this one has 8, top-2",)


def test_a_cpu_decodes_what_is_quantized_only() -> None:
    planner = planner_of("bard")
    for form, notes in (("int8", 1), ("bf12", 1), ("bf16", 0)):
        found = planner.plan(CPU, Question(max_context=2048, form=form)).notes
        assert ["the time of that is left out" in note for note in found] == notes * [True]
    asked = Question(max_context=2048, form="bf16")
    gpt = planner_of("gpt-oss-20b").plan(replace(CPU, memory_bytes=96 * GIB), asked)
    assert not any("quantized" in note for note in gpt.notes)
