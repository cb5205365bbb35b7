"""Registers that tensor cores still read, in PTX written by hand."""

from __future__ import annotations

import pytest

from tests.kernels.in_flight import MOST_LEFT, overwritten

SUMS = "%f1, %f2, %f3, %f4"


def product(*registers: str) -> str:
    """A wgmma of a matrix in ``registers``, and the end of its group."""
    return f"""
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{SUMS}}}, {{{", ".join(registers)}}}, %rd1, 1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;"""


def wait(left: int) -> str:
    return f"wgmma.wait_group.sync.aligned {left}; // of all"


def loop(*body: str) -> str:
    lines = "\n".join(body)
    return f"""
        .visible .entry kernel(.param .u64 kernel_param_0) {{
        .reg .b32 %r<9>;
        mov.b32 %r1, 0;
        $L__BB0_1: // the loop
        {lines}
        {BACK}
        {wait(0)}
        mov.b32 %r1, 0;
        ret;
        }}"""


POLL = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%r7], %r8; @!done bra.uni again; }"
BACK = "@%p1 bra $L__BB0_1;"
FIRST, SECOND = "cvt.rn.bf16x2.f32 %r1, %f5, %f6;", "ld.shared.v2.b32 {%r2, %r3}, [%rd2];"
SAFE = {
    "each product is waited for": loop(FIRST, product("%r1"), wait(0)),
    "the oldest of two is": "\n".join([FIRST, product("%r1"), SECOND, product("%r2", "%r3"), wait(1), FIRST]),
    "another register": loop(product("%r1"), "mov.b32 %r4, %r5;", wait(0)),
    "from shared memory": loop(
        FIRST, f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{SUMS}}}, %rd3, %rd1, 1, 1, 1, 0;"
    ),
    "sums, addresses and what is read": loop(
        product("%r1"), "st.shared.b32 [%r1], %r1;", "add.f32 %f1, %f1, %f2;", "setp.eq.b32 %p1|%p2, %r1, 0;", wait(0)
    ),
    "two blocks with labels of one name": loop(FIRST, product("%r1"), POLL, wait(0), POLL),
    "a name in a block of its own": loop(
        product("%r1"), "{ .reg .b32 codes; mov.b32 codes, %r1; mov.b32 %r4, codes; }", wait(0)
    ),
}
UNSAFE = {
    "no wait": (loop(FIRST, product("%r1")), [FIRST, BACK]),
    "a wait that leaves it": (loop(FIRST, product("%r1"), wait(1)), [FIRST, BACK]),
    "both decoded before the wait": (
        loop(FIRST, SECOND, product("%r1"), wait(1), product("%r2", "%r3"), wait(1)),
        [SECOND, BACK],
    ),
    "on one way alone": (
        loop("@%p2 bra $L__BB0_2;", wait(0), "$L__BB0_2:", FIRST, product("%r1")),
        [FIRST, BACK],
    ),
    "under a predicate": (loop(product("%r1"), f"@!%p3 {FIRST}", wait(0)), [f"@!%p3 {FIRST}"]),
    "in a block of inline assembly": (loop(product("%r1"), "{ mov.b32 %r1, codes; }"), ["mov.b32 %r1, codes;", BACK]),
    "in a copy made in time": (loop("mov.b32 %r5, %r6;", wait(0), "mov.b32 %r1, %r5;", product("%r1")), [BACK]),
    "before its group is committed": (product("%r1").replace("wgmma.commit", f"{FIRST} wgmma.commit"), [FIRST]),
    "long ago": ("\n".join([product("%r1"), *[product("%r4")] * 20, FIRST]), [FIRST]),
}


@pytest.mark.parametrize("name", SAFE)
def test_registers_that_were_waited_for_may_be_written(name: str) -> None:
    assert overwritten(SAFE[name]) == []


@pytest.mark.parametrize("name", UNSAFE)
def test_registers_that_may_still_be_read_are_found(name: str) -> None:
    ptx, found = UNSAFE[name]
    assert overwritten(ptx) == [text.rstrip(";") for text in found]


@pytest.mark.parametrize("left", range(MOST_LEFT))
def test_what_is_left_is_counted_from_the_last_group(left: int) -> None:
    older, newer = [product("%r4")] * 20, [product("%r4")] * left
    begun = "\n".join([*older, product("%r1"), *newer])
    assert overwritten("\n".join([begun, wait(left), FIRST])) == []
    assert overwritten("\n".join([begun, wait(left + 1), FIRST])) == [FIRST.rstrip(";")]
