"""Kernels compiled ahead of time, without a GPU, and what their machine code is made of.

``Compiler`` runs this file as a program, once for many launches: Triton decides when it is imported whether it
interprets, and the tests beside this one let it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.kernels.in_flight import overwritten
from tests.kernels.launches import launch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"^\s*(\.L_\w+):")
# Where the time of a product goes, by what does the sums: tensor cores of each generation, else the FMA units.
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
SUMS = (*TENSOR_CORES, "FFMA", "FFMA2")
GLOBAL_LOADS = ("LDG", "LDGSTS")


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel. ``code`` and ``loop`` count instructions by full name, in all of it and in the hot loop.

    ``hash`` is that of what was compiled once; ``constants`` are the launch's keyword arguments; ``local_bytes`` a
    thread's stack and local memory; ``registers`` a thread's; ``shared_bytes`` a CTA's; ``overwritten`` instructions
    that write to registers which tensor cores still read.
    """

    kernel: str
    hash: str
    constants: dict[str, Any]
    registers: int
    local_bytes: int
    shared_bytes: int
    code: dict[str, int]
    loop: dict[str, int]
    overwritten: list[str]

    def count(self, *names: str, loop: bool = False) -> int:
        """Instructions whose names begin with one of ``names``, a part being what stands between dots."""
        counts = self.loop if loop else self.code
        return sum(count for name, count in counts.items() if name.partition(".")[0] in names)

    def loads(self, width: int, loop: bool = True) -> int:
        """Global loads of at least ``width`` bytes a thread."""
        counts = self.loop if loop else self.code
        return sum(
            n for name, n in counts.items() if name.partition(".")[0] in GLOBAL_LOADS and bytes_of(name) >= width
        )


def bytes_of(instruction: str) -> int:
    """How many bytes a thread's memory instruction moves."""
    for part in reversed(instruction.split(".")):
        if part in {"8", "U8", "S8", "U16", "S16", "16", "64", "128", "256"}:
            return int(part.lstrip("US")) // 8
    return 4


class Compiler:
    """Processes that compile what ``tests.kernels.launches`` launches, each in the order that it is asked to."""

    def __init__(self, num_processes: int = 2) -> None:
        self._processes = [_Process() for _ in range(num_processes)]
        self._answers: dict[tuple[str, int], Future[str]] = {}

    def order(self, launch: str, arch: int) -> Future[str]:
        """Asks for a launch on ``arch`` (90: sm_90), once, and does not wait."""
        if (launch, arch) not in self._answers:
            process = self._processes[len(self._answers) % len(self._processes)]
            self._answers[launch, arch] = process.order(launch, arch)
        return self._answers[launch, arch]

    def __call__(self, launch: str, arch: int) -> list[MachineCode]:
        """The kernels of one launch for ``arch``, in their order; AssertionError if one does not compile."""
        answer = json.loads(self.order(launch, arch).result())
        assert isinstance(answer, list), answer
        return [MachineCode(**code) for code in answer]

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for process in self._processes:
            process.close()


class _Process:
    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._asked: SimpleQueue[Future[str]] = SimpleQueue()
        Thread(target=self._listen, daemon=True).start()

    def order(self, launch: str, arch: int) -> Future[str]:
        assert self._process.stdin
        future: Future[str] = Future()
        self._asked.put(future)
        print(json.dumps([launch, arch]), file=self._process.stdin, flush=True)
        return future

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._asked.get().set_result(line)
        while not self._asked.empty():
            self._asked.get().set_result('"the compiler has ended"')


class _NoDevice:
    """Triton's driver of a GPU that is not there. Its number is its architecture, so each has a cache of its own."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


def compiled(launching: Callable[[], None], arch: int) -> list[MachineCode]:
    """Calls ``launching`` with every kernel compiled as its operands want it, and none started."""
    found = []
    original = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binary = original(kernel, *args, grid=grid, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if isinstance(value, int | str)}
        found.append(read(binary, constants))

    driver.set_active(_NoDevice(arch))
    JITFunction.run = compile_only
    try:
        launching()
    finally:
        JITFunction.run = original
    return found


def read(binary: CompiledKernel, constants: dict[str, Any]) -> MachineCode:
    """What the tools in Triton's wheel say of a compiled kernel."""
    registers, local_bytes, code, loop = _disassembled(binary.asm["cubin"])
    shared_bytes, written = binary.metadata.shared, overwritten(binary.asm["ptx"])
    return MachineCode(binary.name, binary.hash, constants, registers, local_bytes, shared_bytes, code, loop, written)


@cache
def _disassembled(cubin: bytes) -> tuple[int, int, Counter[str], Counter[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", "-ndf", file.name)
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], *count_instructions(listing)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def count_instructions(listing: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions of a disassembly and of its hot loop: the innermost loop with the most sums."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := INSTRUCTION.search(line):
            names.append(instruction[1])
            target = re.search(r"`\((\.L_\w+)\)", instruction[2])
            if instruction[1].startswith("BRA") and target and labels.get(target[1], len(names)) < len(names):
                loops.append((labels[target[1]], len(names)))
    innermost = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    counted = [Counter(names[first:last]) for first, last in innermost]
    return Counter(names), max(counted, key=_sums, default=Counter())


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _sums(loop: Counter[str]) -> int:
    return sum(count for name, count in loop.items() if name.partition(".")[0] in SUMS)


def main() -> None:
    """Answers lines [launch, architecture] with lists of MachineCode, or with what went wrong."""
    os.nice(19)  # it works beside the other tests, of which some have threads that wait for each other
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arch = json.loads(line)
        try:
            answer: Any = [vars(code) for code in compiled(partial(launch, name, arch), arch)]
        except Exception as error:
            answer = f"{name} for sm_{arch}: {type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
