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

RECOMMENDATION_FILE, PREDICTOR_FILE = "duoserve-choice.json", "predictor.safetensors"
_MAX_BYTES = 1 << 24  # enough for the rows of fifteen thousand replays


@dataclass(frozen=True)
class Recommendation:
    """The name of a ``policy``, and ``why`` it is best. ``use_predictor`` False: its prefetch does not pay."""

    policy: str
    use_predictor: bool
    why: str


def save_recommendation(
    checkpoint: Checkpoint,
    best: Recommendation,
    predictor: RowPredictor | None,
    figures: Mapping[str, Any],
    cache_dir: str | Path | None = None,
) -> Path:
    """Writes the recommendation beside the model and returns the folder.

    The folder is in the cache if the model's own is read-only, or in the package, whose files stay as they were
    shipped. Raises CheckpointError if there is no cache, TraceError if the recommendation cannot be written.
    """
    about: dict[str, Any] = {
        "fingerprint": checkpoint.fingerprint(),
        "policy": best.policy,
        "predictor": best.use_predictor,
    }
    with _writing_to(_place(checkpoint, cache_dir)) as folder:
        if best.use_predictor and predictor is not None:
            save_predictor(predictor, folder / PREDICTOR_FILE, {"chosen_for": best.policy})
        about |= {"why": best.why, "figures": figures}
        write_whole(folder / RECOMMENDATION_FILE, f"{json.dumps(about, indent=1)}\n".encode())
    return folder


def check_place(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> None:
    """Raises the errors of ``save_recommendation`` that can be known before there is a recommendation."""
    with _writing_to(_place(checkpoint, cache_dir)) as folder:
        for name in (PREDICTOR_FILE, RECOMMENDATION_FILE):
            check_writable(folder / name)


def find_recommendation(
    checkpoint: Checkpoint, cache_dir: str | Path | None = None
) -> tuple[Recommendation, Path] | None:
    """The recommendation for this model and the folder it lies in; None if there is none.

    A file that was written for another model is passed over. Raises TraceError if a file is malformed.
    """
    for folder in _places(checkpoint, cache_dir):
        path = folder / RECOMMENDATION_FILE
        if is_file(path):
            best = _read(path, checkpoint.fingerprint())
            if best is not None:
                return best, folder
    return None


def predictor_beside(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> RowPredictor | None:
    """The predictor that lies beside the model, or in the cache; None if there is none."""
    folders = (folder for folder in _places(checkpoint, cache_dir) if is_file(folder / PREDICTOR_FILE))
    return next((recommended_predictor(folder, checkpoint) for folder in folders), None)


def recommended_predictor(folder: Path, checkpoint: Checkpoint) -> RowPredictor:
    """The predictor in a folder that ``find_recommendation`` gave.

    Raises TraceError as ``load_predictor`` does, also if the file is missing.
    """
    return load_predictor(folder / PREDICTOR_FILE, checkpoint.fingerprint())


def _read(path: Path, fingerprint: str) -> Recommendation | None:
    try:
        about = read_object(path, _MAX_BYTES)
    except CheckpointError as error:
        raise TraceError(f"{path}: cannot be read ({error}); run duoserve evaluate again") from error
    if about.get("fingerprint") != fingerprint:
        return None
    policy = about.get("policy")
    if not isinstance(policy, str) or policy not in POLICIES:
        raise TraceError(f"{path}: names the policy {policy!r}, which is not known; run duoserve evaluate again")
    return Recommendation(policy, about.get("predictor") is True, str(about.get("why", "")))


def _places(checkpoint: Checkpoint, cache_dir: str | Path | None) -> list[Path]:
    """Where recommendations may lie. They are written to the first place, so the last one made is found first."""
    own, cached = [checkpoint.folder], []
    for cache in (cache_dir, None):  # duoserve evaluate writes to the default cache, whatever is given here
        with suppress(CheckpointError):  # a model may need no cache
            cached.append(_cached(checkpoint, cache_folder(cache)))
    return [*cached, *own] if _is_as_shipped(checkpoint) else [*own, *cached]


def _is_as_shipped(checkpoint: Checkpoint) -> bool:
    """Whether nothing may be written beside the model."""
    return checkpoint.folder.is_relative_to(EMBEDDED_FOLDER) or not os.access(checkpoint.folder, os.W_OK)


def _cached(checkpoint: Checkpoint, cache: Path) -> Path:
    return cache / "choices" / checkpoint.fingerprint()


def _place(checkpoint: Checkpoint, cache_dir: str | Path | None) -> Path:
    """Where a recommendation is written."""
    return _cached(checkpoint, cache_folder(cache_dir)) if _is_as_shipped(checkpoint) else checkpoint.folder


@contextmanager
def _writing_to(folder: Path) -> Iterator[Path]:
    """Makes ``folder``; raises TraceError if it, or what the block writes there, cannot be written."""
    with refused_as(TraceError, f"{folder}: the recommendation cannot be written there"):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
