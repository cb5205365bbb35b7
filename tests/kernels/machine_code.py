"""Kernels compiled ahead of time, without a GPU, and what their machine code is made of.

``Compiler`` runs this file as a program, once for many launches: Triton decides when it is imported whether it
interprets, and the tests beside this one let it.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.kernels.in_flight import overwritten
from tests.kernels.launches import launch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;\n]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")  # of a branch
INSTRUCTION_BYTES = 16
AT_A_TIME = 24  # launches whose kernels are disassembled at a time
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


class Kernel(NamedTuple):
    """A kernel that Triton has compiled, and the launch's keyword arguments."""

    binary: CompiledKernel
    constants: dict[str, Any]

    @property
    def cubin(self) -> bytes:
        """The ELF file with its machine code."""
        cubin: bytes = self.binary.asm["cubin"]
        return cubin


def compiled(launching: Callable[[], None], arch: int) -> list[Kernel]:
    """Calls ``launching`` with every kernel compiled as its operands want it, and none started."""
    found = []
    original = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binary = original(kernel, *args, grid=grid, warmup=True, **kwargs)
        found.append(Kernel(binary, {name: value for name, value in kwargs.items() if isinstance(value, int | str)}))

    driver.set_active(_NoDevice(arch))
    JITFunction.run = compile_only
    try:
        launching()
    finally:
        JITFunction.run = original
    return found


def read(kernels: Sequence[Kernel], arch: int) -> list[MachineCode]:
    """What the tools in Triton's wheel say of kernels that were compiled for ``arch``."""
    counted = _counted(list(dict.fromkeys(kernel.cubin for kernel in kernels)), arch)
    return [_read(kernel, *counted[kernel.cubin]) for kernel in kernels]


def _read(kernel: Kernel, code: Counter[str], loop: Counter[str]) -> MachineCode:
    usage = _tool("cuobjdump", "-res-usage", contents=kernel.cubin)
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    registers, local_bytes, binary = numbers["REG"], numbers["STACK"] + numbers["LOCAL"], kernel.binary
    shared_bytes, written = binary.metadata.shared, overwritten(binary.asm["ptx"])
    return MachineCode(
        binary.name, binary.hash, kernel.constants, registers, local_bytes, shared_bytes, code, loop, written
    )


def _counted(cubins: Sequence[bytes], arch: int) -> dict[bytes, tuple[Counter[str], Counter[str]]]:
    """The instructions of each, and of its hot loop; disassembled as one, since nvdisasm is slow to begin."""
    texts = [text_of(cubin) for cubin in cubins]
    name = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    instructions = INSTRUCTION.findall(_tool("nvdisasm", "-b", name, contents=b"".join(texts)))
    assert len(instructions) * INSTRUCTION_BYTES == sum(map(len, texts)), "not all could be read"
    counted, start = {}, 0
    for cubin, text in zip(cubins, texts, strict=True):
        own = instructions[start : start + len(text) // INSTRUCTION_BYTES]
        counted[cubin] = count_instructions([name for name, _ in own], _loops(own, start))
        start += len(own)
    return counted


def text_of(cubin: bytes) -> bytes:
    """The code of the one kernel in an ELF file, its section ``.text.NAME``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, of_names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + entry_bytes * index) for index in range(count)]
    names = sections[of_names][1]
    (text,) = [
        cubin[start : start + size] for name, start, size in sections if cubin.startswith(b".text.", names + name)
    ]
    return text


def _tool(name: str, *arguments: str, contents: bytes) -> str:
    """What a tool prints of a file with these ``contents``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(contents)
        file.flush()
        command = [TOOLS / name, *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _loops(instructions: Sequence[tuple[str, str]], start: int) -> list[tuple[int, int]]:
    """Loops, first and behind the last: branches backwards. The first instruction is the ``start``-th of the file."""
    loops = []
    for at, (name, operands) in enumerate(instructions):
        if name.startswith("BRA") and (target := TARGET.search(operands)):
            first = int(target[1], 16) // INSTRUCTION_BYTES - start
            if 0 <= first <= at:
                loops.append((first, at + 1))
    return loops


def count_instructions(names: Sequence[str], loops: Sequence[tuple[int, int]]) -> tuple[Counter[str], Counter[str]]:
    """Instructions of a kernel and of its hot loop: the innermost loop with the most sums."""
    innermost = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    counted = [Counter(names[first:last]) for first, last in innermost]
    return Counter(names), max(counted, key=_sums, default=Counter())


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _sums(loop: Counter[str]) -> int:
    return sum(count for name, count in loop.items() if name.partition(".")[0] in SUMS)


def main() -> None:
    """Answers lines [launch, architecture] in their order with lists of MachineCode, or with what went wrong."""
    os.nice(19)  # it works beside the other tests, of which some have threads that wait for each other
    answers, sys.stdout = sys.stdout, sys.stderr
    asked: SimpleQueue[str] = SimpleQueue()
    Thread(target=lambda: [asked.put(line) for line in chain(sys.stdin, [""])], daemon=True).start()
    waiting: list[tuple[int, list[Kernel] | str]] = []
    while line := asked.get():
        name, arch = json.loads(line)
        try:
            waiting.append((arch, compiled(partial(launch, name, arch), arch)))
        except Exception as error:
            waiting.append((arch, f"{name} for sm_{arch}: {type(error).__name__}: {error}"))
        if len(waiting) == AT_A_TIME or asked.empty():
            try:
                told = answered(waiting)
            except Exception as error:
                told = [f"{type(error).__name__}: {error}"] * len(waiting)
            for answer in told:
                print(json.dumps(answer), file=answers, flush=True)
            waiting.clear()


def answered(waiting: Sequence[tuple[int, list[Kernel] | str]]) -> list[list[dict[str, Any]] | str]:
    """What is told of launches: of each the architecture, and its kernels or what went wrong."""
    kernels: dict[int, list[Kernel]] = {arch: [] for arch, _ in waiting}
    for arch, found in waiting:
        kernels[arch] += found if isinstance(found, list) else []
    codes = {arch: iter(read(of_arch, arch)) for arch, of_arch in kernels.items() if of_arch}
    return [
        found if isinstance(found, str) else [vars(code) for code in islice(codes[arch], len(found))]
        for arch, found in waiting
    ]


if __name__ == "__main__":
    main()
