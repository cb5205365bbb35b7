"""Kernel calls that are repeated from a tape: the results of the compiled work, and no tape where that is more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from duoserve.kernels.compiled import tape
from duoserve.kernels.compiled.compiler import CpuCompiler, TapedRecording
from tests.helpers.compiled_case import needs_compiler
from tests.kernels.common import assert_same_bits

pytestmark = needs_compiler

REPLAYS = 4  # the first through PyTorch, the second writes down what the others repeat


def two_sums(source_NK: Tensor, out_N: Tensor, number: int) -> None:
    """Has buffers whose sizes and places depend on the number."""
    part_nK = source_NK[:number]
    wide_2nK = torch.stack([part_nK * 2, part_nK.exp()]).as_strided((2, number, 3), (number * 3, 3, 1))
    out_N.copy_(wide_2nK.sum((0, 1)))


def truth(source_NK: Tensor, number: int) -> Tensor:
    return (source_NK[:number] * 2 + source_NK[:number].exp()).sum(0)


def test_a_tape_is_good_for_the_number_that_it_was_written_with() -> None:
    source_NK, out_N = torch.rand(40, 3), torch.zeros(3)
    recording = CpuCompiler(taped=True).record_for(partial(two_sums, source_NK, out_N), range(2, 41))
    for number in [3] * REPLAYS + [7] * REPLAYS + [40, 3, 3, 3, 40]:
        source_NK.uniform_()
        out_N.fill_(torch.nan)
        recording.replay(number)
        torch.testing.assert_close(out_N, truth(source_NK, number))
    assert isinstance(recording, TapedRecording) and recording.compiled.tape is not None


def test_like_work_shares_a_tape_and_each_has_its_own_operands() -> None:
    compiler = CpuCompiler(taped=True)
    pairs = [(torch.rand(5), torch.zeros(5)) for _ in range(3)]

    def double(source: Tensor, out: Tensor) -> None:
        out.copy_((source * 2).flip(0) + source.sum())

    recordings = [compiler.record(partial(double, *pair)) for pair in pairs]
    source, out = torch.rand(5), torch.zeros(5)
    pairs.append((source, out))
    recordings.append(recordings[0].on(dict(zip(pairs[0], pairs[-1], strict=True))))
    for _ in range(REPLAYS):
        for source, out in pairs:
            source.uniform_()
            out.fill_(torch.nan)
        for recording in recordings:
            recording.replay()
        for source, out in pairs:
            torch.testing.assert_close(out, (source * 2).flip(0) + source.sum())
    assert len({id(recording.compiled) for recording in recordings}) == 1


def test_the_bits_are_those_of_the_compiled_work(monkeypatch: pytest.MonkeyPatch) -> None:
    written, write_down = [], tape.write_down
    monkeypatch.setattr(tape, "write_down", lambda *call: written.append(write_down(*call)) or written[-1])
    results = []
    for taped in (False, True):
        x_K, out_N = torch.linspace(-3, 3, 64), torch.zeros(16)
        w_NK = torch.sin(torch.arange(16 * 64.0)).view(16, 64)
        work = partial(lambda x, w, out: out.copy_((w * x).sum(-1).sigmoid()), x_K, w_NK, out_N)
        recording = CpuCompiler(taped=taped).record(work)
        for _ in range(REPLAYS):
            out_N.fill_(torch.nan)
            recording.replay()
        results.append(out_N.clone())
    assert_same_bits(*results)
    assert len(written) == 1 and written[0] is not None


def test_a_wrapper_that_may_hide_work_has_no_tape() -> None:
    """A tape that lacks what others call would be silently wrong."""

    def behind_another(wrapper: Callable[..., object]) -> Callable[..., object]:
        return lambda inputs: wrapper([*inputs])

    def of_kernels(inputs: list[Tensor]) -> None:
        cpp_fused_0(empty_strided_cpu((1,), (1,), torch.float32), *inputs)  # noqa: F821

    def with_partitions(inputs: list[Tensor]) -> None:
        cpp_fused_0(*inputs)  # noqa: F821
        inputs.partitions[0](inputs)

    assert tape.calls_kernels_alone(of_kernels)
    for wrapper in (None, print, behind_another(of_kernels), with_partitions, lambda inputs: None):
        assert not tape.calls_kernels_alone(wrapper)


def test_work_that_calls_an_op_has_no_tape() -> None:
    a_NN, out_NN = torch.rand(8, 8), torch.zeros(8, 8)
    recording = CpuCompiler(taped=True).record(lambda: out_NN.copy_(torch.linalg.inv(a_NN)))
    for _ in range(REPLAYS):
        a_NN.uniform_().add_(torch.eye(8) * 8)
        out_NN.fill_(torch.nan)
        recording.replay()
        torch.testing.assert_close(out_NN, torch.linalg.inv(a_NN))
    assert isinstance(recording, TapedRecording) and recording.compiled.tape is None
