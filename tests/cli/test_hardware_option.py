"""What ``evaluate`` and ``replay`` take for the machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from duoserve.cli import hardware_option
from duoserve.replaying.hardware import HARDWARE

MADE_UP = ("replay", "synthetic:mixtral-8x7b", "--requests", "1", "--tokens", "4", "--prompt-tokens", "3")


@pytest.mark.parametrize(("device", "name"), [("cpu", "ddr4"), ("cuda", "pcie4")])
def test_without_a_name_it_is_the_card_most_like_this_one(monkeypatch, device, name):
    monkeypatch.setattr(hardware_option, "resolve_device", {"auto": torch.device(device)}.__getitem__)
    assert hardware_option.replayed_on(None).name == name


def test_experts_come_over_the_link_of_a_gpu_and_from_the_disk_of_a_cpu(monkeypatch):
    assert hardware_option.replayed_on("rtx4090") == HARDWARE["rtx4090"]
    assert hardware_option.replayed_on("ddr5") == replace(HARDWARE["ddr5"], link=HARDWARE["ddr5"].disk)
    measured = replace(HARDWARE["ddr4"], name="this", disk=1e9)
    monkeypatch.setattr(hardware_option, "this_machine", lambda: measured)
    assert hardware_option.replayed_on("this") == replace(measured, link=1e9)


def test_a_replay_is_made_on_it(duoserve, monkeypatch):
    """A hundredth of the disk's rate, and what waits for it takes a hundred times as long."""
    asked = (*MADE_UP, "--slots", "64", "--policies", "on-demand", "--json")

    def tpot(name):
        return json.loads(duoserve(*asked, "--hardware", name).out)[0]["tpot_s"]

    slow = replace(HARDWARE["ddr4"], name="this", disk=HARDWARE["ddr4"].disk / 100)
    monkeypatch.setattr(hardware_option, "this_machine", lambda: slow)
    assert tpot("this") == pytest.approx(100 * tpot("ddr4"), rel=0.2)


@pytest.mark.parametrize("command", ["evaluate", "replay"])
def test_help_says_the_defaults(duoserve, command):
    said = " ".join(duoserve(command, "--help").out.split())
    assert "'this' (this machine, measured once)" in said
    assert "default: pcie4 where there is a GPU, else ddr4" in said
    assert "(default: 25%)" in said or "(default: 12.5%,25%,50%)" in said
