"""Traces of an embedded model that goes on with passages of Shakespeare, from works it has seen or two it has not."""

from __future__ import annotations

import random
from pathlib import Path

from duoserve.config import EngineConfig
from duoserve.sampling import SamplingParams
from duoserve.traces.trace import Trace
from duoserve.tracing import RecordingSpec, record
from shakespeare import HELD_OUT, read_works

NEW_TOKENS = 128
TRAIN, HELD = "train", "held"


def passages(texts: list[str], count: int, seed: int) -> list[str]:
    """Prompts of 100 to 400 characters, cut from anywhere; a long text gives more than a short one."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        text, length = rng.choices(texts, [len(text) for text in texts])[0], rng.randint(100, 400)
        start = rng.randrange(len(text) - length)
        found.append(text[start : start + length].partition(" ")[2])
    return found


def prompts(texts: Path, part: str, count: int) -> list[str]:
    """``part``: TRAIN, from the works that the models were trained on, or HELD, from the two plays."""
    works = {name: text.strip() for name, text in read_works(texts).items()}
    chosen = [works[name] for name in HELD_OUT] if part == HELD else [works[n] for n in works if n not in HELD_OUT]
    return passages(chosen, count, seed=1 if part == HELD else 0)


def traced(model: str, those: list[str], file: Path) -> Trace:
    """The trace of these prompts in ``file``, recorded as far as it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    recording = RecordingSpec(file, SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, seed=0), resume=True)
    return record(model, those, recording, EngineConfig(), "resident", progress=True)
