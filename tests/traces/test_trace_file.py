"""Traces in files: what is written is read, what is cut short is refused or cut back, what is another's is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from duoserve.errors import TraceError
from duoserve.traces.trace import Trace, TraceMeta
from duoserve.traces.trace_file import TraceWriter, open_trace
from tests.traces.small import META, save_trace, small_trace


def assert_same(one: Trace, other: Trace) -> None:
    assert one.meta == other.meta
    for name in one.meta.columns():
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


def test_what_is_written_request_by_request_is_read(tmp_path):
    trace = small_trace()
    save_trace(trace, tmp_path / "t")
    read = open_trace(tmp_path / "t", META.fingerprint)
    assert_same(read, trace)
    for one, other in zip(read, trace, strict=True):
        for step in range(one.num_steps):
            for ours, theirs in zip(one.routing(step), other.routing(step), strict=True):
                np.testing.assert_array_equal(ours.topk_ids_TK, theirs.topk_ids_TK)
                assert ours.ahead.keys() == theirs.ahead.keys()


def test_rows_over_the_borders_of_segments(tmp_path):
    trace = small_trace()
    save_trace(trace, tmp_path / "t")
    for start, stop in [(0, 12), (3, 5), (4, 9), (8, 10), (5, 5), (11, 12)]:
        ours, theirs = open_trace(tmp_path / "t").layer(2, start, stop), trace.layer(2, start, stop)
        np.testing.assert_array_equal(ours.ahead_NE, theirs.ahead_NE)
        assert ours.topk_ids_NK.dtype == np.uint8


def test_a_request_is_a_plain_safetensors_file(tmp_path):
    trace = small_trace()
    save_trace(trace, tmp_path / "t", last=1)
    tensors = load_file(tmp_path / "t")
    assert tensors.keys() == trace.meta.columns().keys()
    np.testing.assert_array_equal(tensors["topk_ids.3"], trace[0].layers[3].topk_ids_NK)


def test_several_requests_in_one_safetensors_file_are_read(tmp_path):
    trace = small_trace()
    save_trace(trace, tmp_path / "one", last=1)
    with safe_open(tmp_path / "one", "numpy") as file:
        about = file.metadata()
    save_file({name: trace.read(name) for name in trace.meta.columns()}, tmp_path / "t", metadata=about)
    assert_same(open_trace(tmp_path / "t"), trace)


def test_requests_are_added(tmp_path):
    trace = small_trace()
    save_trace(trace, tmp_path / "t", 0, 2)
    save_trace(trace, tmp_path / "t", 2)
    assert_same(open_trace(tmp_path / "t"), trace)


@pytest.mark.parametrize("lost", [1, 100, 700])
def test_a_tail_cut_short_is_refused_and_then_cut_off(tmp_path, lost):
    path, trace = tmp_path / "t", small_trace()
    save_trace(trace, path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(TraceError, match=r"the last \d+ bytes are no whole request; .*--resume.* 2 whole"):
        open_trace(path)
    save_trace(trace, path, 2)
    assert_same(open_trace(path), trace)


@pytest.mark.parametrize("kept", [9, 60, 400, -1])
def test_a_first_request_cut_short_is_refused_and_then_written_anew(tmp_path, kept):
    path, trace = tmp_path / "t", small_trace()
    save_trace(trace, path, last=1)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TraceError, match=r"the last \d+ bytes are no whole request; .*--resume.* 0 whole"):
        open_trace(path)
    save_trace(trace, path)
    assert_same(open_trace(path), trace)


@pytest.mark.parametrize(
    "content", [b"t", (400).to_bytes(8, "little"), (400).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"']
)
def test_what_may_be_no_trace_cut_short_is_not_overwritten(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError, match="is no trace"):
        TraceWriter(tmp_path / "t", META)
    assert (tmp_path / "t").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "fault"), [("preadv", "Input/output error"), ("fstat", "changed after it was opened")]
)
def test_a_failing_read_cuts_nothing_off(tmp_path, monkeypatch, name, fault):
    path, trace = tmp_path / "t", small_trace()
    save_trace(trace, path)
    before, call, calls = path.read_bytes(), getattr(os, name), []

    def fails_later(descriptor, *args):
        calls.append(descriptor)
        if len(calls) <= 3:
            return call(descriptor, *args)
        if name == "preadv":
            raise OSError(5, "Input/output error")
        return os.stat_result((0o100644, *[0] * 9))

    monkeypatch.setattr(os, name, fails_later)
    with pytest.raises(TraceError, match=fault):
        TraceWriter(path, META)
    calls.clear()
    with pytest.raises(TraceError, match=fault):
        open_trace(path)
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_a_trace_has_one_writer_at_a_time(tmp_path):
    path, trace = tmp_path / "t", small_trace()
    first = TraceWriter(path, META)
    with pytest.raises(TraceError, match="another recording goes into it"):
        TraceWriter(path, META)
    first.append(trace[0].token_ids_T, trace[0].num_prompt, trace[0].layers)
    first.close()
    save_trace(trace, path, 1)
    assert_same(open_trace(path), trace)


def test_a_pipe_is_no_place_for_a_trace(tmp_path):
    os.mkfifo(tmp_path / "t")
    with pytest.raises(TraceError, match="cannot be written"):
        TraceWriter(tmp_path / "t", META)


def test_another_models_trace_is_refused(tmp_path):
    save_trace(small_trace(), tmp_path / "t")
    with pytest.raises(TraceError, match=r"another model \(fingerprint a fingerprint, this model's is b"):
        open_trace(tmp_path / "t", "b")
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(TraceError, match="another model"):
        TraceWriter(tmp_path / "t", replace(META, fingerprint="b"))
    assert (tmp_path / "t").read_bytes() == before


def test_how_it_was_made_is_kept_and_not_asked_of_older_traces(tmp_path):
    told = small_trace(replace(META, conditions="this way"))
    save_trace(told, tmp_path / "t")
    assert open_trace(tmp_path / "t").meta == told.meta
    save_trace(small_trace(), tmp_path / "older")
    assert b"conditions" not in (tmp_path / "older").read_bytes()
    assert open_trace(tmp_path / "older").meta.conditions == ""
    with pytest.raises(TraceError, match="recorded with nothing that is known, and this would be with this way"):
        TraceWriter(tmp_path / "older", told.meta)


def test_traces_of_two_models_in_one_file_are_refused(tmp_path):
    for name, fingerprint in (("a", "a"), ("b", "b")):
        save_trace(small_trace(replace(META, fingerprint=fingerprint)), tmp_path / name)
    (tmp_path / "t").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    with pytest.raises(TraceError, match="different models"):
        open_trace(tmp_path / "t")


@pytest.mark.parametrize("content", [b"", b"no trace", (2).to_bytes(8, "little") + b"{}"])
def test_what_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError):
        open_trace(tmp_path / "t")


def test_what_is_no_trace_is_not_overwritten(tmp_path):
    (tmp_path / "t").write_text("somebody's notes, which are no trace at all")
    with pytest.raises(TraceError, match="is no trace"):
        TraceWriter(tmp_path / "t", META)
    assert (tmp_path / "t").read_text().startswith("somebody's")


def test_a_full_disk_is_said(tmp_path):
    writer = TraceWriter(tmp_path / "t", META)
    writer._file.close()
    writer._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the writer closes it
    [request, *_] = small_trace()
    with pytest.raises(TraceError, match=r"No space left.*--resume"):
        writer.append(request.token_ids_T, request.num_prompt, request.layers)
    writer.close()


def test_a_missing_file(tmp_path):
    with pytest.raises(TraceError, match="is missing"):
        open_trace(tmp_path / "t")


def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path):
    path = tmp_path / "t"
    save_trace(small_trace(lengths=[(12, 2)]), path)
    path.write_bytes(
        path.read_bytes().replace(
            b'"topk_ids.2":{"dtype":"U8","shape":[12,2]', b'"topk_ids.2":{"dtype":"U8","shape":[6,4] '
        )
    )
    with pytest.raises(TraceError, match=r"topk_ids.2 is torch.uint8 \(6, 4\), not uint8 \(12, 2\)"):
        open_trace(path)


@pytest.mark.parametrize("layers", [(2, 0, 3), (0, 2, 2), (-1, 2, 3)])
def test_layers_that_no_pass_goes_through_are_refused(tmp_path, layers):
    save_trace(small_trace(replace(META, layers=layers)), tmp_path / "t")
    with pytest.raises(TraceError, match=r"layers \[.*\], not in ascending order"):
        open_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("claim", "fault"),
    [
        ({"layers": (0, 2, 10**9)}, "layer 1000000000 of 6 experts"),
        ({"layers": (0, 2, 10**5), "num_experts": 1000}, "layer 100000 of 1000 experts"),
        ({"num_experts": 65537}, "layer 3 of 65537 experts"),
    ],
)
def test_sizes_that_no_model_has_are_refused(tmp_path, claim, fault):
    """Tables of what is kept by layer and expert would be made of them."""
    save_trace(small_trace(replace(META, **claim), [(2, 1)]), tmp_path / "t")
    with pytest.raises(TraceError, match=f"{fault}, more than any model has"):
        open_trace(tmp_path / "t")


@pytest.mark.parametrize("layers", ["[1e999]", "[[1]]", "5", "[", "[" * 100_000])
def test_layers_that_are_no_numbers_are_refused(tmp_path, layers):
    trace = small_trace()
    save_trace(trace, tmp_path / "one", last=1)
    with safe_open(tmp_path / "one", "numpy") as file:
        about = file.metadata() | {"layers": layers}
    save_file({name: trace.read(name) for name in trace.meta.columns()}, tmp_path / "t", metadata=about)
    with pytest.raises(TraceError, match="is no trace of this version"):
        open_trace(tmp_path / "t")


def test_a_trace_that_is_refused_is_closed(tmp_path):
    path = tmp_path / "t"
    save_trace(small_trace(), path)
    with pytest.raises(TraceError, match="another model"):
        open_trace(path, "b")
    for content in (path.read_bytes()[:-1], b"", b"no trace"):
        path.write_bytes(content)
        with pytest.raises(TraceError):
            open_trace(path)
    assert str(path) not in [os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()]


def test_a_trace_that_changes_while_it_is_used_is_said_to_be_one(tmp_path):
    path = tmp_path / "t"
    save_trace(small_trace(), path)
    read = open_trace(path)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(TraceError, match=r"t: changed after it was opened .* load the model or trace again$"):
        read.layer(2)


def test_many_experts_and_scores_beyond_half_precision(tmp_path):
    trace = small_trace(TraceMeta("f", (1, 2), num_experts=300, top_k=3), [(2, 1)])
    layers = dict(trace[0].layers)
    layers[2] = layers[2]._replace(ahead_NE=np.full((2, 300), -1e9))
    writer = TraceWriter(tmp_path / "t", trace.meta)
    writer.append([1, 2], 1, layers)
    writer.close()
    read = open_trace(tmp_path / "t")
    assert read.layer(1).topk_ids_NK.dtype == np.uint16 and np.isfinite(read.layer(2).ahead_NE).all()
    np.testing.assert_array_equal(read.layer(1).topk_ids_NK, trace.layer(1).topk_ids_NK)


class Looked(list):
    """Counts how often it is looked into."""

    looks = 0

    def __getitem__(self, at):
        self.looks += 1
        return super().__getitem__(at)

    def __iter__(self):
        self.looks += len(self)
        return super().__iter__()


def test_a_request_of_many_is_read_without_a_look_at_the_others(tmp_path):
    trace = small_trace(lengths=[(2, 1)] * 300)
    save_trace(trace, tmp_path / "t", last=300)
    read = open_trace(tmp_path / "t")
    assert read.num_tokens == 600
    read._rows._segments = looked = Looked(read._rows._segments)
    np.testing.assert_array_equal(read[250].layers[2].topk_ids_NK, trace[250].layers[2].topk_ids_NK)
    assert looked.looks == len(read.meta.columns()) - 1


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("requests", [[4, 2], [5, 3], [4, 1]], "other tokens than theirs"),
        ("requests", [[4, 2], [5, 0], [3, 1]], "requests without a prompt"),
        ("requests", [[4, 5], [5, 3], [3, 1]], "requests without a prompt"),
        ("requests", np.zeros((0, 2)), "or none"),
        ("topk_ids.2", [[0, 6]] * 12, "topk_ids.2 has expert 6 of 6"),
        ("topk_ids.2", [[0, 1]] * 11 + [[5, 5]], "topk_ids.2 has a token that chose an expert twice"),
        ("lookahead.3", [[0.0] * 5 + [np.nan]] * 12, "lookahead.3 has values that are no numbers"),
    ],
)
def test_what_no_router_said_is_refused(tmp_path, name, values, fault):
    trace = small_trace()
    tensors = {one: trace.read(one) for one in trace.meta.columns()}
    tensors[name] = np.array(values, dtype=tensors[name].dtype)
    save_trace(trace, tmp_path / "one", last=1)
    with safe_open(tmp_path / "one", "numpy") as file:
        save_file(tensors, tmp_path / "t", metadata=file.metadata())
    with pytest.raises(TraceError, match=fault):
        read = open_trace(tmp_path / "t")
        read.layer(2), read.layer(3)
