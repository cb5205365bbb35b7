"""A process that is told to end while it packs does not pack on."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from duoserve.experts.pack_folder import LOCK_FILE

PACKING = """
import signal, sys, time
from pathlib import Path
from duoserve.experts.packing import write_pack
from duoserve.server.run import serve
from duoserve.server.settings import ServerSettings
from tests.helpers.fakes import ArrayStore

class Slow(ArrayStore):
    def read(self, expert, row_B):
        super().read(expert, row_B)
        if expert == self.experts[2]:
            print("packing", flush=True)
        time.sleep(0.2)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes begin with it ignored

def pack():
    store = Slow(num_layers=20, num_experts=20)
    write_pack(store, store.experts, Path(sys.argv[1]), "f")
"""
SERVE = PACKING + "serve(ServerSettings('x', port=0), pack, print)"
ALONE = PACKING + "pack()"


@pytest.mark.parametrize(
    ("script", "number"),
    [(SERVE, signal.SIGTERM), (SERVE, signal.SIGINT), (ALONE, signal.SIGINT)],
    ids=["a server by SIGTERM", "a server by Ctrl-C", "a program by Ctrl-C"],
)
def test_a_signal_ends_a_process_that_packs(tmp_path: Path, script: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "packing\n"
            process.send_signal(number)
            process.wait(30)  # all that there is to pack takes 40 s
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("script", "number"),
    [(SERVE, signal.SIGTERM), (ALONE, signal.SIGINT)],
    ids=["a server by SIGTERM", "a program by Ctrl-C"],
)
def test_a_signal_ends_a_process_that_waits_for_another(tmp_path: Path, script: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", script, str(tmp_path)]
    with (tmp_path / LOCK_FILE).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                assert "another process is packing there: waiting for it" in process.stderr.readline()
                process.send_signal(number)
                process.wait(10)
            finally:
                process.kill()
