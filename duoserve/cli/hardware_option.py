"""The machine that a replay is made on: by name, else the card that is most like this one."""

from __future__ import annotations

import argparse
from dataclasses import replace

from duoserve.experts.device import resolve_device
from duoserve.planning.this_machine import THIS, this_machine
from duoserve.replaying.hardware import HARDWARE, Hardware, find_hardware

WITH_GPU, WITHOUT = "pcie4", "ddr4"


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Adds ``--hardware``; ``replayed_on`` interprets it, and also None."""
    names = f"'{THIS}' (this machine, measured once), or one of {', '.join(HARDWARE)}"
    default = f"default: {WITH_GPU} where there is a GPU, else {WITHOUT}, whose experts come from an NVMe disk"
    parser.add_argument("--hardware", metavar="NAME", help=f"{names} ({default})")


def replayed_on(name: str | None) -> Hardware:
    """The machine called ``name``, or a card like this one if None. On a CPU its link is the disk.

    Raises ConfigError for an unknown name, and as ``this_machine`` does.
    """
    if name is None:
        name = WITHOUT if resolve_device("auto").type == "cpu" else WITH_GPU
    found = this_machine() if name == THIS else find_hardware(name)
    return replace(found, link=found.disk) if found.host_computes else found
