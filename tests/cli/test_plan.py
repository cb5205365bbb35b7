"""``duoserve plan``: tables, JSON, refusals, a picture."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from duoserve.cli import plan as command
from duoserve.cli.plan_plot import tpot_over_memory
from duoserve.planning.model_cards import find_model
from duoserve.planning.planner import Planner
from duoserve.planning.policy_speed import Question
from duoserve.planning.rehearsal import PolicyTimes, PromptTimes, Rehearsal, StepTimes
from duoserve.replaying.hardware import GIB, HARDWARE, find_hardware


def test_a_table_for_each_machine(duoserve):
    ran = duoserve("plan", "Mixtral-8x7B", "--hardware", "rtx4090, a6000", "--format", "int4")
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert (ran.code, ran.err) == (0, "")
    assert lines[0] == "rtx4090: experts in int4-128-float16, 87.94 MiB each; 1 x 512 tokens and 256 new ones"
    assert any(line.startswith("a6000: experts in int4") for line in lines)
    assert any(line.startswith("total 19.1") for line in lines)
    assert any(line.startswith("best: duoserve") for line in lines)
    assert any(line.startswith("1 GiB more: ") and line.endswith("x as fast") for line in lines)
    assert any(line.startswith("note: assumed: 64.00 GiB of RAM") for line in lines)


def test_json_has_the_same_and_more(duoserve):
    ran = duoserve("plan", "qwen3-30b-a3b", "--hardware", "rtx4090", "--prompt", "2k", "--batch", "4", "--json")
    (found,) = json.loads(ran.out)["plans"]
    assert found["total_bytes"] == sum(
        (found["dense_bytes"], found["kv_bytes"], found["workspace_bytes"], found["slots"] * found["slot_bytes"])
    )
    best = found["policies"][0]
    assert found["best"] == best["policy"] == "duoserve"
    assert best["tpot_bound"] == "link" == max(best["tpot_busy_s"], key=best["tpot_busy_s"].get)
    assert found["would_buy"]["int4"]["tpot_s"] < found["would_buy"]["1 GiB more"]["tpot_s"] < best["tpot_s"]
    assert found["routing"] == "qwen3-30b-a3b"


def test_a_link_and_a_disk_can_be_changed(duoserve):
    def tpot(*change):
        ran = duoserve("plan", "mixtral-8x22b", "--json", "--hardware", *change)
        return json.loads(ran.out)["plans"][0]["policies"][0]["tpot_s"]

    usual = tpot("rtx4090")
    assert tpot("rtx4090@pcie3x8") > usual < tpot("rtx4090", "--disk", "sata")
    assert tpot("rtx4090@pcie4x16") == usual


def test_one_refusal_among_others_is_said_in_its_place(duoserve):
    ran = duoserve("plan", "mixtral-8x22b", "--hardware", "rtx3060,h200", "--format", "bf16")
    assert ran.code == 0
    assert "rtx3060: cannot run it\n  at least " in ran.out
    assert "h200: experts in bfloat16" in ran.out
    as_json = duoserve("plan", "mixtral-8x22b", "--hardware", "rtx3060,h200", "--format", "bf16", "--json")
    refused, planned = json.loads(as_json.out)["plans"]
    assert "slots for top-2 and one prefetch" in refused["refusal"]
    assert planned["best"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["mixtral-8x22b", "--hardware", "rtx3060,rtx4070"],
            1,
            "17938853376 bytes of GPU memory must be free (16.71 GiB: 3 slots",
        ),
        (["mixtral-8x7b", "--hardware", "abacus"], 1, "hardware 'abacus' is not known"),
        (["mixtral-8x7b", "--hardware", "rtx4090@string"], 1, "link 'string' is not known: use one of pcie3x16"),
        (["gpt-9", "--hardware", "rtx4090"], 1, "'gpt-9' is no folder here"),
        (["mixtral-8x7b", "--hardware", "rtx4090", "--prompt", "0"], 2, "'0' is no count of 1 or more"),
        (["mixtral-8x7b", "--hardware", "rtx4090", "--memory", "lots"], 1, "'lots' is not an amount of memory"),
    ],
)
def test_what_cannot_be_planned_is_refused(duoserve, arguments, code, said):
    ran = duoserve("plan", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err


@pytest.fixture
def rehearsals(monkeypatch):
    """What was rehearsed on a made-up machine, where a resident layer takes a second, and ten milliseconds a step."""
    asked = []

    def rehearse(model, layout, prompt, *, anew):
        asked.append((layout.slot_bytes, prompt))
        times = PolicyTimes(StepTimes((0.01,), 0.0), PromptTimes((0.0,), (1.0,), 0.0))
        return Rehearsal(layout.slot_bytes, prompt, {"resident": {"disk": times}})

    monkeypatch.setattr(command, "this_machine", lambda anew: HARDWARE["ddr4"])
    monkeypatch.setattr(command, "this_rehearsal", rehearse)
    return asked


def test_this_machine_is_the_default_and_the_model_is_rehearsed_on_it(duoserve, rehearsals):
    ran = duoserve("plan", "bard", "--max-context", "1024", "--prompt", "100")
    assert ran.code == 0
    assert ran.out.startswith("this: experts in bfloat16")
    assert "  best: resident" in ran.out
    assert "6.00 s" in ran.out
    assert "note: times are those of made-up layers of these sizes, run on this machine" in ran.out
    assert rehearsals == [(393216, 100)]


@pytest.mark.parametrize("other", [("--hardware", "rtx4090"), ("--disk", "sata"), ("--hardware", "this@pcie4x8")])
def test_other_machines_are_not_rehearsed(duoserve, rehearsals, other):
    assert duoserve("plan", "bard", "--max-context", "1024", *other).code == 0
    assert rehearsals == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [(("--prompt", "100k"), "positions that the model knows"), (("--memory", "1MiB"), "raise memory to at least")],
)
def test_what_is_refused_is_not_rehearsed_first(duoserve, rehearsals, asked, said):
    ran = duoserve("plan", "bard", *asked)
    assert ran.code == 1 and said in ran.err
    assert rehearsals == []


def test_another_disk_is_not_held_to_what_one_read_gets_of_the_one_that_is_here(duoserve, monkeypatch):
    here = replace(HARDWARE["ddr4"], disk=0.4e9, reader=0.3e9)
    monkeypatch.setattr(command, "this_machine", lambda anew: here)
    asked = ("plan", "mixtral-8x7b", "--format", "int4", "--expert-slots", "25%", "--host-memory", "0", "--json")
    ran = (duoserve(*asked, *more) for more in (("--disk", "nvme5"), ("--hardware", "ddr4", "--disk", "nvme5")))
    (this,), (card,) = (json.loads(one.out)["plans"] for one in ran)
    assert this["policies"] == card["policies"]


def test_hit_rates_may_be_those_of_chance(duoserve):
    asked = ("plan", "mixtral-8x7b", "--hardware", "rtx4090", "--format", "int4", "--json")
    (own,), (chance,) = (json.loads(duoserve(*asked, *more).out)["plans"] for more in ((), ("--routing", "uniform")))
    assert (own["routing"], chance["routing"]) == ("mixtral-8x7b", "uniform")
    assert (
        chance["policies"][0]["hit_rate"] == chance["slots"] / chance["total_experts"] < own["policies"][0]["hit_rate"]
    )
    assert chance["notes"][0].startswith("hit rates are those of chance")


LARGE = replace(find_hardware("rtx4090"), memory_bytes=64 * GIB)


def test_tpot_falls_as_memory_grows():
    planner = Planner("mixtral-8x7b", find_model("mixtral-8x7b"))
    plan = planner.plan(find_hardware("rtx4090"), Question(form="int4"))
    points = tpot_over_memory(planner, plan)
    assert len(points) == 24
    assert [nbytes for nbytes, _ in points] == sorted({nbytes for nbytes, _ in points})
    times = [seconds for _, seconds in points]
    assert times == sorted(times, reverse=True)
    assert points[-1][0] - points[0][0] == (256 - 3) * plan.memory.slot_bytes
    ends = [
        planner.plan(plan.hardware, Question(form="int4", expert_slots=3)).best,
        planner.plan(LARGE, plan.question).best,
    ]
    assert [points[0][1], points[-1][1]] == [best.tpot.total for best in ends]
    assert points[0][0] < plan.memory.total_bytes < points[-1][0] < 32 * GIB


@pytest.mark.parametrize("hardware", [HARDWARE["ddr5"], LARGE], ids=["cpu", "gpu"])
def test_ram_for_experts_that_wait_is_there_along_the_whole_curve(hardware):
    """Also where none waits, because all have slots; of a machine that was measured no more is there than is free."""
    planner = Planner("qwen3-30b-a3b", find_model("qwen3-30b-a3b"))
    hardware = replace(hardware, name="this", memory_bytes=64 * GIB, host_bytes=4 * GIB)
    plan = planner.plan(hardware, Question(form="int4", host_memory=8 * GIB))
    assert plan.memory.host_bytes == 0
    assert len(tpot_over_memory(planner, plan)) == 24


def test_a_plot_is_drawn(duoserve, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    path = tmp_path / "plan.png"
    assert duoserve("plan", "bard", "--hardware", "rtx4090", "--max-context", "1024", "--plot", path).code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn_is_said(duoserve, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    ran = duoserve(
        "plan", "bard", "--hardware", "rtx4090", "--max-context", "1024", "--plot", tmp_path / "no" / "p.png"
    )
    assert ran.code == 1 and "cannot be drawn" in ran.err


def test_a_plan_does_not_wait_for_torchs_compiler(buffered_command):
    """Importing it takes longer than all plans together."""
    code = "import sys; from duoserve.cli import main; main(sys.argv[1:]); sys.exit('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, "plan", "deepseek-v2-lite", "--hardware", "rtx4090"]
    done = subprocess.run(command, env=buffered_command["env"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
