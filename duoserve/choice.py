"""What ``duoserve evaluate`` found best for a model: a policy and perhaps a predictor, in files that ``auto`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duoserve.errors import CheckpointError, TraceError
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.hub import EMBEDDED_FOLDER
from duoserve.experts.pack_folder import cache_folder
from duoserve.files.positional import is_file
from duoserve.files.strict_json import read_object
from duoserve.files.whole import check_writable, refused_as, write_whole
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.files import load_predictor, save_predictor
from duoserve.scheduling.policies import POLICIES

CHOICE_FILE, PREDICTOR_FILE = "duoserve-choice.json", "predictor.safetensors"
_MAX_BYTES = 1 << 24  # which has the rows of fifteen thousand replays


@dataclass(frozen=True)
class PolicyChoice:
    """``policy`` is a name; ``use_predictor`` False means that its prefetch does not pay."""

    policy: str
    use_predictor: bool
    why: str


def save_choice(
    checkpoint: Checkpoint,
    choice: PolicyChoice,
    predictor: RowPredictor | None,
    figures: Mapping[str, Any],
    cache_dir: str | Path | None = None,
) -> Path:
    """Writes the choice beside the model; returns the folder.

    To the cache where the model's folder is read-only or the package's own, whose files are as they were shipped;
    CheckpointError: there is none. TraceError where the choice cannot be written.
    """
    about: dict[str, Any] = {
        "fingerprint": checkpoint.fingerprint(),
        "policy": choice.policy,
        "predictor": choice.use_predictor,
    }
    with _writing_to(_place(checkpoint, cache_dir)) as folder:
        if choice.use_predictor and predictor is not None:
            save_predictor(predictor, folder / PREDICTOR_FILE, {"chosen_for": choice.policy})
        about |= {"why": choice.why, "figures": figures}
        write_whole(folder / CHOICE_FILE, f"{json.dumps(about, indent=1)}\n".encode())
    return folder


def check_place(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> None:
    """The errors of ``save_choice``, as far as they can be known before there is a choice."""
    with _writing_to(_place(checkpoint, cache_dir)) as folder:
        for name in (PREDICTOR_FILE, CHOICE_FILE):
            check_writable(folder / name)


def find_choice(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> tuple[PolicyChoice, Path] | None:
    """The choice for this model and the folder it lies in; None if there is none.

    One that was made for another model is passed over. TraceError for one that is malformed.
    """
    for folder in _places(checkpoint, cache_dir):
        path = folder / CHOICE_FILE
        if is_file(path):
            choice = _read(path, checkpoint.fingerprint())
            if choice is not None:
                return choice, folder
    return None


def predictor_beside(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> RowPredictor | None:
    """The predictor that lies beside the model, or in the cache; None if there is none."""
    folders = (folder for folder in _places(checkpoint, cache_dir) if is_file(folder / PREDICTOR_FILE))
    return next((chosen_predictor(folder, checkpoint) for folder in folders), None)


def chosen_predictor(folder: Path, checkpoint: Checkpoint) -> RowPredictor:
    """The predictor in a folder that ``find_choice`` gave; TraceError as in load_predictor, also if there is none."""
    return load_predictor(folder / PREDICTOR_FILE, checkpoint.fingerprint())


def _read(path: Path, fingerprint: str) -> PolicyChoice | None:
    try:
        about = read_object(path, _MAX_BYTES)
    except CheckpointError as error:
        raise TraceError(f"{path}: cannot be read ({error}); run duoserve evaluate again") from error
    if about.get("fingerprint") != fingerprint:
        return None
    policy = about.get("policy")
    if not isinstance(policy, str) or policy not in POLICIES:
        raise TraceError(f"{path}: names the policy {policy!r}, which is not known; run duoserve evaluate again")
    return PolicyChoice(policy, about.get("predictor") is True, str(about.get("why", "")))


def _places(checkpoint: Checkpoint, cache_dir: str | Path | None) -> list[Path]:
    """Where choices may lie: first where they are written, so that the last one made is the first one found."""
    own, cached = [checkpoint.folder], []
    for cache in (cache_dir, None):  # where duoserve evaluate writes, whatever is given here
        with suppress(CheckpointError):  # without a cache, models run that need none
            cached.append(_cached(checkpoint, cache_folder(cache)))
    return [*cached, *own] if _is_as_shipped(checkpoint) else [*own, *cached]


def _is_as_shipped(checkpoint: Checkpoint) -> bool:
    """Whether nothing may be written beside the model."""
    return checkpoint.folder.is_relative_to(EMBEDDED_FOLDER) or not os.access(checkpoint.folder, os.W_OK)


def _cached(checkpoint: Checkpoint, cache: Path) -> Path:
    return cache / "choices" / checkpoint.fingerprint()


def _place(checkpoint: Checkpoint, cache_dir: str | Path | None) -> Path:
    """Where a choice is written."""
    return _cached(checkpoint, cache_folder(cache_dir)) if _is_as_shipped(checkpoint) else checkpoint.folder


@contextmanager
def _writing_to(folder: Path) -> Iterator[Path]:
    """Makes ``folder``; TraceError where that, or what the block writes there, cannot be written."""
    with refused_as(TraceError, f"{folder}: the choice cannot be written there"):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
