"""Recorded steps of a context that grows: few recordings, whose page tables are wider than the context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duoserve.experts.layout import ExpertId
from duoserve.kv_cache import PAGE_TOKENS, PagedKVCache, SequenceKV, pages_for
from duoserve.launching.launch import StepParts
from duoserve.launching.recorded import ExactShapes
from duoserve.models.mixtral import parse_config
from duoserve.passes import StepRunner
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.lagging import LaggingDevice, write

EXPERTS = [ExpertId(0, expert) for expert in range(8)]
# Tokens of prompts that three steps follow, in one page, in 40, and from page to page.
LENGTHS = (10, PAGE_TOKENS - 1, 300, 8 * PAGE_TOKENS - 1, 1000, 32 * PAGE_TOKENS - 1, 39 * PAGE_TOKENS)


def run(folder: Path, mode: str) -> tuple[list[list[list[int]]], LaggingDevice]:
    """What follows each prompt, and the device, which has the logits; mode "" is the model itself."""
    device = LaggingDevice(seed=9, in_ram=EXPERTS)

    def runner(parts: StepParts) -> StepRunner:
        if mode:
            return device.recorded(mode)(parts)
        return device.lagging(lambda new_tokens: parts.model(parts.cache.batch(new_tokens)))

    with assembled(
        folder, "lru", 6, device.copies, make_pool=device.pool, make_step_runner=runner, max_context=4096
    ) as engine:
        prompts = [[(11 * i * i + 5 * i) % 95 + 1 for i in range(length)] for length in LENGTHS]
        return [write(engine, [prompt], [4]) for prompt in prompts], device


@pytest.mark.parametrize(("mode", "parts"), [("graph", 1), ("event", 3)])
def test_a_context_of_up_to_40_pages_takes_two_recordings(mode: str, parts: int, tmp_path: Path) -> None:
    assert [pages_for(length + 3) for length in LENGTHS] == [1, 2, 5, 9, 16, 33, 40]
    folder = save_mixtral(tmp_path, max_position_embeddings=4096, num_hidden_layers=1)
    (true_tokens, true), (tokens, device) = run(folder, ""), run(folder, mode)
    assert tokens == true_tokens and len(device.logits) == 3 * len(LENGTHS)
    assert all(torch.equal(one, other) for one, other in zip(device.logits, true.logits, strict=True))
    assert device.recorder.num_recordings == 2 * parts


@pytest.mark.parametrize(("num_pages", "widths"), [(5, {5}), (40, {8, 40}), (300, {8, 64, 128, 256, 300})])
def test_page_tables_of_recordings_have_few_widths_and_no_more_columns_than_pages(
    num_pages: int, widths: set[int]
) -> None:
    config = parse_config({"model_type": "mixtral", "dtype": "bfloat16", "num_hidden_layers": 1})
    cache, sequence = PagedKVCache(config, num_pages * PAGE_TOKENS, torch.bfloat16, device="meta"), SequenceKV()
    found = set()
    for pages in range(1, num_pages + 1):
        cache.reserve(sequence, pages * PAGE_TOKENS)
        num_sequences, width = ExactShapes(num_pages).of(cache.extend([(sequence, [0])]))
        assert num_sequences == 1 and width >= pages
        found.add(width)
    assert found == widths
