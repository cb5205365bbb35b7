"""What a pack is on disk: a folder with ``experts.pack`` (rows of experts) and ``pack.json`` (what the rows are)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from duoserve.errors import CheckpointError, KernelError
from duoserve.experts.layout import FORMS, ExpertId, ExpertLayout
from duoserve.files.strict_json import read_object
from duoserve.number_checks import is_integer

PACK_FILE = "experts.pack"
HEADER_FILE = "pack.json"
FORMAT_VERSION = 1
_MAX_HEADER_BYTES = 65536
REMEDY = "delete the folder and pack the checkpoint again"


@dataclass(frozen=True)
class PackHeader:
    """``experts.pack`` holds num_layers * num_experts rows of ``slot_bytes`` bytes each, layer by layer.

    ``dtype`` is a name of FORMS ("bfloat16", "fp8"); ``hidden`` and ``intermediate`` count elements; ``fingerprint`` is
    the checkpoint's. Two packs with equal headers are interchangeable.
    """

    format_version: int
    fingerprint: str
    dtype: str
    hidden: int
    intermediate: int
    num_layers: int
    num_experts: int
    slot_bytes: int

    @classmethod
    def for_layout(cls, layout: ExpertLayout, num_layers: int, num_experts: int, fingerprint: str) -> PackHeader:
        """The header of a pack whose rows have ``layout``."""
        return cls(
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint,
            dtype=layout.name,
            hidden=layout.hidden,
            intermediate=layout.intermediate,
            num_layers=num_layers,
            num_experts=num_experts,
            slot_bytes=layout.slot_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """The size that ``experts.pack`` must have."""
        return self.num_layers * self.num_experts * self.slot_bytes

    def offset(self, expert: ExpertId) -> int:
        """Byte offset of an expert's row in ``experts.pack``."""
        return (expert.layer * self.num_experts + expert.expert) * self.slot_bytes

    def to_dict(self) -> dict[str, Any]:
        """What ``pack.json`` holds."""
        return asdict(self)


def read_pack_header(folder: Path) -> PackHeader:
    """The checked header of a pack's ``folder``; CheckpointError if it is missing, malformed or of another version."""
    path = folder / HEADER_FILE
    try:
        raw = read_object(path, _MAX_HEADER_BYTES)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: is no pack that can be used ({error}); {REMEDY}") from error
    if raw.get("format_version") != FORMAT_VERSION:  # looked at first: another version may have other fields
        found = raw.get("format_version")
        raise CheckpointError(f"{path}: format_version is {found!r}, this duoserve reads {FORMAT_VERSION}; {REMEDY}")
    _check_fields(raw, path)
    header = PackHeader(**raw)
    _check_slot_bytes(header, path)
    return header


def _check_slot_bytes(header: PackHeader, path: Path) -> None:
    expert = f"an expert of hidden {header.hidden}, intermediate {header.intermediate} in {header.dtype}"
    try:
        takes = ExpertLayout(FORMS[header.dtype], header.hidden, header.intermediate).slot_bytes
    except KernelError as error:
        raise CheckpointError(f"{path}: there is no {expert} ({error}); {REMEDY}") from error
    if header.slot_bytes != takes:
        raise CheckpointError(f"{path}: slot_bytes is {header.slot_bytes}, but {expert} takes {takes}; {REMEDY}")


def _check_fields(raw: dict[str, Any], path: Path) -> None:
    wanted = {field.name for field in fields(PackHeader)}
    if raw.keys() != wanted:
        odd = sorted(raw.keys() ^ wanted)
        raise CheckpointError(f"{path}: has to hold exactly {sorted(wanted)}, wrong are {odd}; {REMEDY}")
    for name in sorted(wanted - {"fingerprint", "dtype"}):
        if not is_integer(raw[name]) or raw[name] < 1:
            raise CheckpointError(f"{path}: {name} is {raw[name]!r}, but must be a positive integer; {REMEDY}")
    if not isinstance(raw["fingerprint"], str):
        raise CheckpointError(f"{path}: fingerprint is {raw['fingerprint']!r}, but must be text; {REMEDY}")
    if raw["dtype"] not in list(FORMS):  # a list: the value may be unhashable
        raise CheckpointError(f"{path}: dtype is {raw['dtype']!r}, supported are {', '.join(FORMS)}; {REMEDY}")
