"""resolve_model(): folders, the embedded model, the hub (which is never really reached here)."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from duoserve.errors import CheckpointError
from duoserve.experts import hub
from duoserve.experts.hub import DESCRIPTION_FILES, TEXT_FILES, at_revision, resolve_model


class Hub:
    """Stands for snapshot_download: keeps what it was asked, returns a folder or raises."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id} | options)
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)

    def takes(self, file: str) -> bool:
        """Whether the patterns of the last call let a file through, as huggingface_hub applies them."""
        allowed, ignored = (self.calls[-1][key] for key in ("allow_patterns", "ignore_patterns"))
        return any(fnmatch(file, p) for p in allowed) and not any(fnmatch(file, p) for p in ignored)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | Exception], Hub]:
    def put(answer: Path | Exception) -> Hub:
        made = Hub(answer)
        monkeypatch.setattr(hub, "snapshot_download", made)
        return made

    return put


@pytest.fixture(autouse=True)
def offline(connect: Callable[[Path | Exception], Hub]) -> Hub:
    return connect(AssertionError("the network was asked"))


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model") == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model("model") == Path("model")


@pytest.mark.parametrize("name", ["bard", "bard-fine"])
def test_the_embedded_models_have_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.EMBEDDED_FOLDER.parts[-2:] == ("duoserve", "assets")
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "EMBEDDED_FOLDER", tmp_path)
    assert resolve_model(name) == tmp_path / name


@pytest.mark.parametrize("name", ["bard", "bard-fine"])
def test_one_missing_from_the_installation_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=rf"'{name}' is not part of this installation: .*{name} is missing; "):
        resolve_model(name)


def test_a_name_that_is_close_to_an_embedded_models_gets_them_named() -> None:
    with pytest.raises(CheckpointError, match=r"'bard-fin' is no folder here, .* and not 'bard' or 'bard-fine'"):
        resolve_model("bard-fin")


@pytest.mark.parametrize(
    "model",
    ["./mine/model", "/no/such/folder", "~/no/such", "../x", "a/b/c", "mistral", "owner/", "", "bard/", "a\\b", "o/n@"],
)
def test_what_looks_like_a_path_never_goes_to_the_network(model: str, offline: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"no folder here, no hub id|has no config\.json"):
        resolve_model(model)
    assert not offline.calls


@pytest.mark.parametrize("model", [None, 5, b"bard"])
def test_what_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(CheckpointError, match=r"is no model: give a folder, a hub id \(owner/name\) or 'bard' or"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["x" * 5000, "~nobody-of-this-name/x"])
def test_a_name_that_no_file_system_has_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"no folder here, no hub id"):
        resolve_model(model)


def test_a_path_object_never_goes_to_the_network(offline: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"'owner/name' is no folder here, .*: owner/name is missing; give"):
        resolve_model(Path("owner/name"))
    assert not offline.calls


def test_a_file_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is a file, not a folder; give the folder that holds"):
        resolve_model(folder / "config.json")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: has no config\.json; give the folder"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("revision", [None, "main", "v0.1", "refs/pr/3", "0123abc"])
def test_a_hub_id_is_downloaded(folder: Path, connect: Callable[[Path | Exception], Hub], revision: str | None) -> None:
    made = connect(folder)
    assert resolve_model(at_revision("mistralai/Mixtral-8x7B-v0.1", revision)) == folder
    wanted = {"repo_id": "mistralai/Mixtral-8x7B-v0.1", "revision": revision}
    assert wanted.items() <= made.calls[0].items()


@pytest.mark.parametrize("model", ["bard", "./mine", "owner/name@v1", Path("owner/name")])
def test_a_revision_is_of_a_hub_id_that_has_none(model: str | Path) -> None:
    assert at_revision(model, None) == model
    with pytest.raises(CheckpointError, match=rf"revision is 'v2', but '{model}' is no hub id \(owner/name\) without"):
        at_revision(model, "v2")


@pytest.mark.parametrize(
    ("file", "taken"),
    [
        ("config.json", True),
        ("model.safetensors", True),
        ("model-00001-of-00019.safetensors", True),
        ("model.safetensors.index.json", True),
        ("tokenizer.json", True),
        ("chat_template.jinja", True),
        ("tokenizer.model", False),
        ("merges.txt", False),
        ("vocab.txt", False),
        ("pytorch_model.bin", False),
        ("consolidated.00.pt", False),
        ("modeling_mixtral.py", False),
        ("tokenizer.pickle", False),
        ("consolidated.safetensors", False),
        ("original/model.safetensors", False),
        ("README.md", False),
    ],
)
def test_only_harmless_files_are_downloaded(
    folder: Path, connect: Callable[[Path | Exception], Hub], file: str, taken: bool
) -> None:
    made = connect(folder)
    resolve_model("owner/name")
    assert made.takes(file) is taken


@pytest.mark.parametrize(
    ("file", "taken"),
    [
        ("config.json", True),
        ("model.safetensors.index.json", True),
        ("generation_config.json", True),
        ("model.safetensors", False),
        ("model-00001-of-00002.safetensors", False),
        ("tokenizer.json", False),
        ("original/config.json", False),
    ],
)
def test_without_weights_only_what_describes_them_is_downloaded(
    folder: Path, connect: Callable[[Path | Exception], Hub], file: str, taken: bool
) -> None:
    made = connect(folder)
    assert resolve_model("owner/name", DESCRIPTION_FILES) == folder
    assert made.takes(file) is taken


@pytest.mark.parametrize(
    ("file", "taken"),
    [
        ("config.json", True),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("chat_template.jinja", True),
        ("model.safetensors.index.json", True),
        ("model.safetensors", False),
        ("tokenization.py", False),
        ("original/tokenizer.json", False),
    ],
)
def test_for_text_all_but_the_weights_is_downloaded(
    folder: Path, connect: Callable[[Path | Exception], Hub], file: str, taken: bool
) -> None:
    made = connect(folder)
    assert resolve_model("owner/name", TEXT_FILES) == folder
    assert made.takes(file) is taken


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the hub without the HTTP response that its constructor wants, another class in each version."""
    return kind.__new__(kind, "injected")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(GatedRepoError), "accepted its terms; do so on its page, then `hf auth login`"),
        (hub_error(RepositoryNotFoundError), "neither a folder here nor a model on the hub; check"),
        (hub_error(RevisionNotFoundError), "no revision 'v9'; check the branch, tag or commit"),
        (LocalEntryNotFoundError("offline"), "the hub was not reached; download it once while online"),
        (RuntimeError("connection refused"), "the download failed; try again"),
        (OSError(28, "No space left on device"), "the download failed; .*No space left on device"),
    ],
)
def test_errors_of_the_hub_come_with_a_remedy(
    connect: Callable[[Path | Exception], Hub], error: Exception, message: str
) -> None:
    connect(error)
    with pytest.raises(CheckpointError, match=f"owner/name: .*{message}") as caught:
        resolve_model("owner/name@v9")
    assert caught.value.__cause__ is error


def test_a_hub_model_without_config_is_refused(tmp_path: Path, connect: Callable[[Path | Exception], Hub]) -> None:
    connect(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve_model("owner/name")
