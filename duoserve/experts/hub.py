"""From what a user calls a model to a folder on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from duoserve.errors import CheckpointError
from duoserve.experts.shards import CONFIG_FILE, INDEX_FILE
from duoserve.files.positional import is_there

EMBEDDED = ("bard", "bard-fine")
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "assets"

# Closed lists: no pickle and no Python reaches the disk. What is ignored are the same weights in other formats.
DESCRIPTION_FILES = (CONFIG_FILE, "generation_config.json", INDEX_FILE)
TEXT_FILES = ("*.json", "*.jinja")  # all but the weights
ALL_FILES = ("*.safetensors", *TEXT_FILES)
_IGNORED_FILES = ["*/*", "consolidated*"]
_NAMES = " or ".join(map(repr, EMBEDDED))
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\S+))?", re.ASCII)


def at_revision(model: str | Path, revision: str | None) -> str | Path:
    """The hub id ``model`` with its branch, tag or commit, "owner/name@revision"; or ``model`` as it is for None.

    Raises CheckpointError if ``model`` is no hub id, or if it has a revision already.
    """
    if revision is None:
        return model
    hub_id = _HUB_ID.fullmatch(model) if isinstance(model, str) else None
    if hub_id is None or hub_id["revision"] is not None:
        raise CheckpointError(f"revision is {revision!r}, but {str(model)!r} is no hub id (owner/name) without one")
    return f"{model}@{revision}"


def resolve_model(model: str | Path, files: Sequence[str] = ALL_FILES) -> Path:
    """The folder of a model: a folder with config.json, the name of an embedded model or a hub id.

    A hub id is ``"owner/name"``, or ``"owner/name@revision"`` for a branch, tag or commit; it is downloaded to
    huggingface_hub's cache, of it those files that a pattern of ``files`` lets through. ``Path("bard")`` and
    ``"./bard"`` are folders. CheckpointError says what was not found.
    """
    if model in EMBEDDED:
        return _checked(EMBEDDED_FOLDER / model, f"the embedded model {model!r} is not part of this installation")
    if not isinstance(model, (str, Path)):
        raise CheckpointError(f"{model!r} is no model: give a folder, a hub id (owner/name) or {_NAMES}")
    unknown = f"{str(model)!r} is no folder here, no hub id (owner/name) and not {_NAMES}"
    try:
        folder = Path(model).expanduser()
        here = folder.exists()
    except (OSError, RuntimeError) as error:  # too long a name, no such home
        raise CheckpointError(f"{unknown} ({error})") from error
    hub_id = None if here or isinstance(model, Path) else _HUB_ID.fullmatch(model)
    if hub_id is None:
        return _checked(folder, unknown)
    downloaded = _download(hub_id["name"], hub_id["revision"], files)
    return _checked(downloaded, f"the hub's {model} is no model that duoserve can load")


def _checked(folder: Path, fault: str) -> Path:
    if not folder.is_dir():
        kind = "a file, not a folder" if folder.exists() else "missing"
        raise CheckpointError(f"{fault}: {folder} is {kind}; give the folder that holds {CONFIG_FILE} and the weights")
    if not is_there(folder / CONFIG_FILE):
        raise CheckpointError(f"{folder}: has no {CONFIG_FILE}; give the folder that save_pretrained or the hub wrote")
    return folder


def _download(model: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=list(files), ignore_patterns=_IGNORED_FILES)
    except Exception as error:  # whatever the hub's transport raises: requests or httpx, by its version
        raise CheckpointError(f"{model}: {_remedy(error, revision)} ({type(error).__name__}: {error})") from error
    return Path(folder)


def _remedy(error: Exception, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return "the hub gives it only to those who accepted its terms; do so on its page, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "neither a folder here nor a model on the hub; check the name, or `hf auth login` if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has the model, but no revision {revision!r}; check the branch, tag or commit"
    if isinstance(error, LocalEntryNotFoundError):
        return "no folder here, not in the hub's cache, and the hub was not reached; download it once while online"
    return "the download failed; try again, or give a folder that has the files"
