"""A checkpoint folder: ``config.json`` and the tensors of its safetensors files, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from duoserve.errors import CheckpointError
from duoserve.experts.layout import DTYPES
from duoserve.experts.safetensors_header import MAX_TENSORS, SafetensorsHeader, TensorInfo, read_header
from duoserve.experts.shards import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, weight_map
from duoserve.files.positional import PositionalFile, read_capped
from duoserve.files.strict_json import parse_object

MAX_CONFIG_BYTES = 1 << 20
# A converting read goes through cache-sized blocks, small enough for torch not to split the copy over threads of its
# own (it does from 32768 elements): they would take the cores from the computation.
_STAGE_ELEMENTS = 32767
_SAMPLE_BYTES = 4096
_MAX_ENTRIES = 4096  # more than any layer has experts: a header may claim any number of empty ones
_MIN_ROW_BYTES = 512  # of shorter rows a copy costs less than a place in the list of buffers
_NAMES_SHOWN = 3
FLOATS = tuple(DTYPES.values())
NO_DTYPES: Mapping[str, Collection[torch.dtype]] = MappingProxyType({})
_REMEDY = "config.json and weights must be of one checkpoint, complete: download all of its files again"


def is_ignorable(name: str) -> bool:
    """Whether no model needs the tensor: RoPE tables of old checkpoints, and the head of a model that ties it."""
    return name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"


@dataclass(frozen=True)
class _Shard:
    file: PositionalFile
    header: SafetensorsHeader


class Checkpoint:
    """An open checkpoint. Reads are positional: any number of threads may read at once.

    ``config`` is the raw ``config.json``; ``tensors`` has every tensor of every shard.
    """

    def __init__(self, folder: Path, config_bytes: bytes, shards: Mapping[str, _Shard]) -> None:
        """Takes over the open shards (by file name); use ``open``."""
        self.folder = folder
        self.config: dict[str, Any] = parse_object(config_bytes, folder / CONFIG_FILE)
        self.tensors = _merge(shard.header for shard in shards.values())
        self._config_bytes = config_bytes
        self._shards = dict(shards)
        self._fingerprint: str | None = None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Opens a folder with config.json and model.safetensors[.index.json]; reads headers only, no weights.

        CheckpointError names the file, the tensor where there is one, and the remedy.
        """
        config_bytes = read_capped(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
        listed = weight_map(folder)
        names = [SINGLE_FILE] if listed is None else sorted(set(listed.values()))
        with ExitStack() as opened:
            shards = {name: _open_shard(folder / name, opened) for name in names}
            checkpoint = cls(folder, config_bytes, shards)
            checkpoint._check_listed(listed or {})
            opened.pop_all()  # all is well: the checkpoint closes the files
        return checkpoint

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        ignorable: Callable[[str], bool] = is_ignorable,
        dtypes: Mapping[str, Collection[torch.dtype]] = NO_DTYPES,
    ) -> None:
        """Raises CheckpointError unless the tensors are exactly ``expected`` (name -> shape), in one of ``dtypes``.

        Those that ``dtypes`` does not name are in a float dtype. Tensors beyond them are allowed where
        ``ignorable(name)``.
        """
        check_names(self.folder, {name: info.file.name for name, info in self.tensors.items()}, expected, ignorable)
        for name, shape in expected.items():
            self._check_tensor(self.tensors[name], tuple(shape), dtypes.get(name, FLOATS))

    def info(self, name: str) -> TensorInfo:
        """Where the tensor lies; CheckpointError if there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}; {_REMEDY}") from None

    def read(self, name: str, dtype: torch.dtype | None = None, entry: int | None = None) -> Tensor:
        """The tensor, or its part ``entry``, as a new CPU tensor in ``dtype`` or its own.

        CheckpointError if it is unknown, unreadable or truncated.
        """
        info = self.info(name).part(entry)
        out = torch.empty(info.shape, dtype=dtype or info.dtype, device="cpu")
        self.read_into(name, out, entry)
        return out

    def read_into(self, name: str, out: Tensor, entry: int | None = None, rows: tuple[int, int] | None = None) -> None:
        """Fills ``out`` with the tensor, or with a part of it as in ``TensorInfo.part``.

        ``out`` has its shape, any strides, and any dtype (converted as by ``Tensor.copy_``).
        """
        info = self.info(name).part(entry, rows)
        if tuple(out.shape) != info.shape:
            raise CheckpointError(f"{_place(info)} has shape {_show(info.shape)}, but {_show(out.shape)} is needed")
        if out.dtype == info.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read_bytes(info, out, 0)
        elif info.nbytes and _has_whole_rows(out, info.dtype):
            self._read_rows(info, out)
        elif info.nbytes:
            self._read_staged(info, out if out.dim() else out[None])

    @property
    def changed_ns(self) -> int:
        """When a shard was last changed, in ns since the epoch, as it was on opening."""
        return max(shard.file.modified_ns for shard in self._shards.values())

    def fingerprint(self) -> str:
        """SHA-256 (hex) over config.json, the shards' names, sizes and headers, and 4 KiB from each tensor's middle.

        Of a tensor that holds a layer's experts, 4 KiB from the middle of each. ``changed_ns`` is for other changes.
        """
        if self._fingerprint is None:
            self._fingerprint = self._compute_fingerprint()
        return self._fingerprint

    def close(self) -> None:
        """Closes the files; idempotent. No read may be under way; reads after it raise ClosedError."""
        for shard in self._shards.values():
            shard.file.close()

    def _compute_fingerprint(self) -> str:
        digest = hashlib.sha256()
        _add(digest, self._config_bytes)
        for name, shard in sorted(self._shards.items()):
            _add(digest, f"{name} {shard.file.size}".encode())
            _add(digest, shard.header.sha256)
            samples = [_middle(part) for part in chain.from_iterable(map(_sampled, shard.header.tensors))]
            for offset, nbytes in samples:
                shard.file.expect(offset, nbytes)
            for offset, nbytes in samples:
                _add(digest, shard.file.read(offset, nbytes))
        return digest.hexdigest()

    def _check_listed(self, listed: Mapping[str, str]) -> None:
        for name, file in listed.items():
            info = self.tensors.get(name)
            if info is None or info.file.name != file:
                raise CheckpointError(
                    f"{self.folder / file}: tensor {name!r} is not in it, though {INDEX_FILE} says so; "
                    "index and shards are of different checkpoints: download all of them again"
                )

    def _check_tensor(self, info: TensorInfo, shape: tuple[int, ...], dtypes: Collection[torch.dtype]) -> None:
        if info.shape != shape:
            needed = f"but config.json makes it {_show(shape)}"
            raise CheckpointError(f"{_place(info)} has shape {_show(info.shape)}, {needed}; {_REMEDY}")
        if info.dtype not in dtypes:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"{_place(info)} has dtype {info.dtype}; supported are {supported}, by what config.json says of "
                "its quantization"
            )

    def _read_staged(self, info: TensorInfo, out: Tensor) -> None:
        """Reads and copies by blocks of rows, so that no second whole matrix is held."""
        row_bytes = info.nbytes // len(out)
        block = max(1, _STAGE_ELEMENTS * info.dtype.itemsize // row_bytes)
        stage = torch.empty((min(block, len(out)), *out.shape[1:]), dtype=info.dtype, device="cpu")
        for start in range(0, len(out), block):
            rows = stage[: len(out) - start]
            self._read_bytes(info, rows, start * row_bytes)
            out[start : start + block].copy_(rows)

    def _read_rows(self, info: TensorInfo, out: Tensor) -> None:
        """Reads each row to where it belongs."""
        try:
            self._shards[info.file.name].file.read_rows(out.detach().view(torch.uint8).numpy(), info.offset)
        except CheckpointError as error:
            raise CheckpointError(f"{error} [tensor {info.name!r}]") from error

    def _read_bytes(self, info: TensorInfo, out: Tensor, start: int) -> None:
        """Fills the contiguous ``out`` from byte ``start`` of the tensor."""
        buffer = out.detach().reshape(-1).view(torch.uint8).numpy().data
        try:
            self._shards[info.file.name].file.read_into(buffer, info.offset + start)
        except CheckpointError as error:
            raise CheckpointError(f"{error} [tensor {info.name!r}]") from error


def check_names(
    folder: Path, files: Mapping[str, str], expected: Collection[str], ignorable: Callable[[str], bool]
) -> None:
    """Raises CheckpointError unless the tensors in ``files`` (name -> file of ``folder``) are exactly ``expected``.

    Others are allowed where ``ignorable(name)``.
    """
    missing = set(expected) - files.keys()
    if missing:
        raise CheckpointError(f"{folder}: no file has what the model needs: {_some(missing)}; {_REMEDY}")
    extra = {name for name in files.keys() - set(expected) if not ignorable(name)}
    if extra:
        places = {str(folder / files[name]) for name in extra}
        raise CheckpointError(f"{_some(places)}: the model has no place for {_some(extra)}; {_REMEDY}")


def _open_shard(path: Path, opened: ExitStack) -> _Shard:
    file = PositionalFile(path)
    opened.callback(file.close)
    return _Shard(file, read_header(file))


def _sampled(tensor: TensorInfo) -> list[TensorInfo]:
    """The parts that a fingerprint samples: the tensor, or each of the matrices that lie in it."""
    if len(tensor.shape) < 3 or tensor.shape[0] > _MAX_ENTRIES:
        return [tensor]
    return [tensor.part(entry) for entry in range(tensor.shape[0])]


def _middle(part: TensorInfo) -> tuple[int, int]:
    """The offset and the number of the bytes that a fingerprint reads of it."""
    nbytes = min(part.nbytes, _SAMPLE_BYTES)
    return part.offset + (part.nbytes - nbytes) // 2, nbytes


def _merge(headers: Iterable[SafetensorsHeader]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for header in headers:
        for tensor in header.tensors:
            first = merged.setdefault(tensor.name, tensor)
            if first is not tensor:
                raise CheckpointError(f"{_place(tensor)} is in {first.file.name} too; {_REMEDY}")
        if len(merged) > MAX_TENSORS:
            raise CheckpointError(f"{header.tensors[0].file}: more tensors than the {MAX_TENSORS} that are allowed")
    return merged


def _has_whole_rows(out: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows of what is stored lie in ``out`` as they are, and are long enough to be read one by one."""
    as_stored = out.dtype == dtype and out.device.type == "cpu" and out.dim() == 2 and out.stride(1) == 1
    return as_stored and out.shape[1] * dtype.itemsize >= _MIN_ROW_BYTES


def _add(digest: hashlib._Hash, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts run together to the same bytes
    digest.update(part)


def _place(info: TensorInfo) -> str:
    return f"{info.file}: tensor {info.name!r}"


def _show(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _some(names: Iterable[str]) -> str:
    """The first few of the names, and how many there are beyond them."""
    ordered = sorted(names)
    beyond = len(ordered) - _NAMES_SHOWN
    return ", ".join(map(repr, ordered[:_NAMES_SHOWN])) + (f" and {beyond} more" if beyond > 0 else "")
