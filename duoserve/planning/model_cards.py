"""Models that can be planned for without their checkpoint: each is a folder with a config.json and no weights."""

from __future__ import annotations

from pathlib import Path

from duoserve.models.described import DescribedModel, described

CONFIGS = Path(__file__).resolve().parents[1] / "assets" / "configs"
MODEL_CARDS = tuple(sorted(path.parent.name for path in CONFIGS.glob("*/config.json")))


def find_model(model: str | Path) -> DescribedModel:
    """The model by the name of a card (in any case), by folder, hub id or embedded name.

    Raises the errors of ``described``.
    """
    name = str(model).lower()
    return described(CONFIGS / name if name in MODEL_CARDS and not Path(model).is_dir() else model)
