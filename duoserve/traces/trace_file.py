"""Traces in files, which are safetensors files one behind the other, each with one request or more.

A request is written at once when it is done, so a crash leaves whole requests and an incomplete tail.
"""

from __future__ import annotations

import fcntl
import json
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from duoserve.errors import CheckpointError, CutShortError, TraceError
from duoserve.experts.safetensors_header import TensorInfo, read_segment
from duoserve.files.positional import PositionalFile
from duoserve.files.whole import refused_as
from duoserve.traces.trace import IDS, REQUESTS, TOKEN_IDS, LayerTrace, Rows, Trace, TraceMeta

FORMAT = "duoserve trace 1"
AGAIN = "record it again"
_LENGTH_BYTES = 8  # of a header, which begins so:
_BEGINNING = f'{{"__metadata__":{{"format":"{FORMAT}"'.encode()
_MOST_EXPERTS = 1 << 16  # of a layer: their numbers are stored in 16 bits
_MOST_IN_ALL = 1 << 24  # of all layers up to the last, each of which has rows in tables, whether it has experts or not
_LARGEST_HALF = 65504.0
_TYPE_NAMES = {np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8", np.dtype(np.uint16): "U16"}
_TYPE_NAMES[np.dtype(np.float16)] = "F16"


@dataclass(frozen=True)
class Segment:
    """One safetensors file within the file: its model, its tensors, and the byte at which it ends."""

    meta: TraceMeta
    tensors: Mapping[str, TensorInfo]
    end: int


class FileRows(Rows):
    """A trace's tensors in a file, whose segments hold one part of the rows each."""

    def __init__(self, path: Path, file: PositionalFile, segments: Sequence[Segment]) -> None:
        self._path, self._file, self._segments = path, file, segments
        self._meta = segments[0].meta
        self._columns = self._meta.columns()
        self._starts = {  # the first row of each segment, and the end of all rows at last
            name: [0, *accumulate(segment.tensors[name].shape[0] for segment in segments)]
            for name in (REQUESTS, TOKEN_IDS)
        }
        weakref.finalize(self, file.close)

    def read(self, name: str, start: int, stop: int | None) -> np.ndarray:
        column = self._columns[name]
        parts = [np.empty((0, *column.row_shape), column.dtype)]
        for info, low, high in self._spans(name, start, stop):
            width = info.nbytes // max(1, info.shape[0])
            with _read_errors():
                data = self._file.read(info.offset + low * width, (high - low) * width)
            parts.append(np.frombuffer(data, column.dtype).reshape(-1, *column.row_shape))
            self._check(name, parts[-1])
        return np.concatenate(parts)

    def _check(self, name: str, values: np.ndarray) -> None:
        """Raises TraceError for values that no router can give, as nothing computed from them would be right."""
        if name.startswith(IDS) and values.size:
            if values.max() >= self._meta.num_experts:
                raise TraceError(f"{self._path}: {name} has expert {values.max()} of {self._meta.num_experts}; {AGAIN}")
            ordered = np.sort(values)
            if (ordered[:, 1:] == ordered[:, :-1]).any():
                raise TraceError(f"{self._path}: {name} has a token that chose an expert twice; {AGAIN}")
        if values.dtype == np.float16 and np.isnan(values).any():
            raise TraceError(f"{self._path}: {name} has values that are no numbers; {AGAIN}")

    def _spans(self, name: str, start: int, stop: int | None) -> Iterator[tuple[TensorInfo, int, int]]:
        """Each tensor that has some of the rows, with the range of its rows; looks at no other segment."""
        starts = self._starts[REQUESTS if name == REQUESTS else TOKEN_IDS]
        end = starts[-1] if stop is None else min(stop, starts[-1])
        at = bisect_right(starts, start) - 1
        while start < end:
            before, after = starts[at], min(starts[at + 1], end)
            yield self._segments[at].tensors[name], start - before, after - before
            at, start = at + 1, after


def open_trace(path: Path, fingerprint: str | None = None) -> Trace:
    """The trace in the file ``path``, read as it is used.

    Raises TraceError if it is malformed, cut short or empty, or not of the model with ``fingerprint`` (if given).
    """
    file = _open(path)
    try:
        segments = list(_segments(file, path))
        rest = file.size - (segments[-1].end if segments else 0)
        if rest or not segments:
            raise TraceError(
                f"{path}: the last {rest} bytes are no whole request; record into it with --resume, which keeps its "
                f"{len(segments)} whole segments, or record it again"
            )
        _check_fingerprint(path, segments[0].meta, fingerprint)
        return Trace(segments[0].meta, FileRows(path, file, segments))
    except BaseException:
        file.close()
        raise


class TraceWriter:
    """Adds requests of the model ``meta`` to the file ``path``, which is made if there is none.

    A request that an interrupted writer left incomplete is cut off. The file is locked until ``close``. Raises
    TraceError if it is a trace of another model or of other settings, cannot be read or written, or has a writer.
    """

    def __init__(self, path: Path, meta: TraceMeta) -> None:
        self._path, self._meta = path, meta
        with refused_as(TraceError, f"{path}: cannot be written"):
            self._file = path.open("a+b")  # "a+b" refuses a pipe; "ab" would wait for its reader
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def append(self, token_ids: Sequence[int], num_prompt: int, layers: Mapping[int, LayerTrace]) -> None:
        """Writes one request: the tokens that went through the model, and each layer's routing of them.

        Raises TraceError if it cannot be written; what was there before stays whole.
        """
        values = self._meta.named(np.array([[len(token_ids), num_prompt]]), np.array(token_ids), layers)
        with refused_as(TraceError, f"{self._path}: cannot be written", "; --resume goes on with it"):
            self._file.write(_encoded(self._meta, values))
            self._file.flush()

    def close(self) -> None:
        """Closes the file; idempotent. It raises no error: ``append`` has reported what could not be written."""
        with suppress(OSError):
            self._file.close()

    def _claim(self) -> None:
        """Locks out other writers, and cuts off an incomplete request at the end."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(self._whole_bytes())
        except BlockingIOError as error:
            raise TraceError(f"{self._path}: another recording goes into it; wait, or give another --out") from error
        except OSError as error:
            raise TraceError(f"{self._path}: cannot be written ({error})") from error

    def _whole_bytes(self) -> int:
        """The byte at which the last whole request ends; raises TraceError for a file that no writer has begun."""
        file = _open(self._path)
        try:
            segments = list(_segments(file, self._path))
            begun = not file.size or bool(segments) or _is_begun(file)
        finally:
            file.close()
        if not begun:
            raise TraceError(f"{self._path}: is no trace; give --out another name, or remove the file")
        if segments:
            _check_fingerprint(self._path, segments[0].meta, self._meta.fingerprint)
            _check_conditions(self._path, segments[0].meta, self._meta)
        return segments[-1].end if segments else 0


def _open(path: Path) -> PositionalFile:
    with _read_errors():
        return PositionalFile(path)


@contextmanager
def _read_errors() -> Iterator[None]:
    """What cannot be read is a trace, not a model: TraceError."""
    try:
        yield
    except CheckpointError as error:
        raise TraceError(str(error)) from error


def _segments(file: PositionalFile, path: Path) -> Iterator[Segment]:
    """The whole segments from the file's start; raises TraceError if one of them is malformed, or of another model."""
    start, first = 0, None
    while start < file.size:
        try:
            header = read_segment(file, start)
        except CutShortError:
            return  # the caller sees by ``end`` that bytes are left over
        except CheckpointError as error:
            raise TraceError(f"{path}: is no trace from byte {start} on, or cannot be read ({error})") from error
        segment = Segment(_meta_of(header.metadata, path), {t.name: t for t in header.tensors}, header.end)
        first = first or segment
        if segment.meta != first.meta:
            raise TraceError(
                f"{path}: holds traces of different models or conditions, another from byte {start} on; {AGAIN}"
            )
        _check_columns(segment, path)
        _check_requests(segment, file, path)
        yield segment
        start = segment.end


def _is_begun(file: PositionalFile) -> bool:
    """Whether the file begins as ``_encoded`` does, behind the header's length, as far as it goes."""
    with _read_errors():
        there = file.read(_LENGTH_BYTES, max(0, min(len(_BEGINNING), file.size - _LENGTH_BYTES)))
    return there != b"" and _BEGINNING.startswith(there)


def _check_columns(segment: Segment, path: Path) -> None:
    columns = segment.meta.columns()
    if segment.tensors.keys() != columns.keys():
        odd = sorted(segment.tensors.keys() ^ columns.keys())[0]
        raise TraceError(f"{path}: the tensor {odd!r} is missing or has no place in a trace; {AGAIN}")
    rows = segment.tensors[TOKEN_IDS].shape[:1]
    for name, (dtype, row_shape) in columns.items():
        info = segment.tensors[name]
        expected = (info.shape[:1] if name == REQUESTS else rows) + row_shape
        if info.shape != expected or str(info.dtype) != f"torch.{dtype}":
            raise TraceError(f"{path}: {name} is {info.dtype} {info.shape}, not {dtype} {expected}; {AGAIN}")


def _check_requests(segment: Segment, file: PositionalFile, path: Path) -> None:
    info, rows = segment.tensors[REQUESTS], segment.tensors[TOKEN_IDS].shape
    with _read_errors():
        sizes_R2 = np.frombuffer(file.read(info.offset, info.nbytes), np.int32).reshape(-1, 2)
    tokens_R, prompts_R = sizes_R2.T.astype(np.int64)
    if not len(tokens_R) or (prompts_R < 1).any() or (prompts_R > tokens_R).any() or (tokens_R.sum(),) != rows:
        raise TraceError(f"{path}: has requests without a prompt, or none, or other tokens than theirs; {AGAIN}")


def _check_fingerprint(path: Path, meta: TraceMeta, fingerprint: str | None) -> None:
    if fingerprint is not None and meta.fingerprint != fingerprint:
        raise TraceError(
            f"{path}: is the trace of another model (fingerprint {meta.fingerprint:.16}, this model's is "
            f"{fingerprint:.16}); record one of this model with duoserve trace"
        )


def _check_conditions(path: Path, there: TraceMeta, wanted: TraceMeta) -> None:
    if there.conditions != wanted.conditions:
        raise TraceError(
            f"{path}: was recorded with {there.conditions or 'nothing that is known'}, and this would be with "
            f"{wanted.conditions}; record into another file"
        )


def _meta_of(metadata: Mapping[str, str], path: Path) -> TraceMeta:
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']!r}")
        layers = tuple(int(layer) for layer in json.loads(metadata["layers"]))
        sizes = int(metadata["num_experts"]), int(metadata["top_k"])
        meta = TraceMeta(metadata["fingerprint"], layers, *sizes, metadata.get("conditions", ""))
        if not layers or not 1 <= meta.top_k <= meta.num_experts:
            raise ValueError(f"{len(layers)} layers, top-{meta.top_k} of {meta.num_experts}")
        if layers[0] < 0 or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers {list(layers)}, not in ascending order from 0 on")
        if meta.num_experts > _MOST_EXPERTS or meta.shape.depth * meta.num_experts > _MOST_IN_ALL:
            raise ValueError(f"layer {layers[-1]} of {meta.num_experts} experts, more than any model has")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TraceError(f"{path}: is no trace of this version ({error!r}, wanted {FORMAT!r}); {AGAIN}") from error
    return meta


def _encoded(meta: TraceMeta, values: Mapping[str, np.ndarray]) -> bytes:
    """One segment with ``values`` in the dtypes of ``meta``."""
    about = {
        "format": FORMAT,
        "fingerprint": meta.fingerprint,
        "layers": json.dumps(meta.layers),
        "num_experts": str(meta.num_experts),
        "top_k": str(meta.top_k),
    }
    if meta.conditions:
        about["conditions"] = meta.conditions
    entries: dict[str, object] = {"__metadata__": about}
    data, size = [], 0
    for name, column in meta.columns().items():
        given = in_half(values[name]) if column.dtype == np.float16 else values[name].astype(column.dtype)
        tensor = np.ascontiguousarray(given)
        offsets = [size, size := size + tensor.nbytes]
        entries[name] = {"dtype": _TYPE_NAMES[column.dtype], "shape": tensor.shape, "data_offsets": offsets}
        data.append(tensor.tobytes())
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *data])


def in_half(values: np.ndarray) -> np.ndarray:
    """Scores and weights as a trace has them: float16, in which what is beyond its range becomes its largest."""
    halves: np.ndarray = np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
    return halves
