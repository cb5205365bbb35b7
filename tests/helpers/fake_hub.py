"""A hub without a network: repositories are folders, and a download copies files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from duoserve.experts import hub

NAME = "owner/name"


class FakeHub:
    """Stands for snapshot_download: copies what the patterns let through from ``repository`` to ``snapshot``."""

    def __init__(self, repository: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository = repository
        self.snapshot = snapshot
        self.asked: list[tuple[str, str | None]] = []  # names and revisions
        monkeypatch.setattr(hub, "snapshot_download", self)

    def __call__(self, repo_id: str, *, revision: str | None = None, **patterns: Any) -> str:
        self.asked.append((repo_id, revision))
        self.snapshot.mkdir(exist_ok=True)
        for file in filter_repo_objects((path.name for path in self.repository.iterdir()), **patterns):
            shutil.copy(self.repository / file, self.snapshot / file)
        return str(self.snapshot)

    @property
    def weights(self) -> list[str]:
        """The files of weights that were downloaded."""
        return sorted(path.name for path in self.snapshot.glob("*.safetensors"))
