"""What replays are asked for, and their table."""

from __future__ import annotations

import pytest

from duoserve.cli.replay_report import contestants, slot_counts, table
from duoserve.errors import ConfigError
from duoserve.experts import budget
from duoserve.replaying.bake_off import CONTESTANTS, bake_off, rows
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from duoserve.scheduling.plan import ModelShape
from tests.traces.drawn import drawn_trace

MACHINE = Machine(Hardware("even", 1e10, 1e11, 1e14, 0.0, 1e-4), LayerSizes("small", 1_000_000, 8, 1_000_000, 64))


def test_everybody_is_all_but_resident_and_the_oracle() -> None:
    assert contestants("all") == list(CONTESTANTS)
    assert "resident" not in CONTESTANTS and CONTESTANTS[-1] == "oracle"
    assert contestants("lru, oracle") == ["lru", "oracle"]
    with pytest.raises(ConfigError, match="'mru' is not known"):
        contestants("lru,mru")


def test_slots_are_counts_or_shares() -> None:
    shape = ModelShape(16, 2, tuple(range(6)))
    assert slot_counts("25%, 12.5%,96,3", shape) == [24, 12, 96, 3]
    with pytest.raises(ConfigError, match=r"2 is 2 slots.*3\.\.96"):
        slot_counts("96,2", shape)
    for share in ("12.5%", "35%", "52.6%", "99.9%"):
        assert slot_counts(share, shape) == [budget.slot_count(share, 96)]  # what an engine has
    for wrong in ("many", "nan%", "inf%"):
        with pytest.raises(ConfigError, match="neither a count nor a share"):
            slot_counts(wrong, shape)


def test_a_table_has_a_place_for_every_figure() -> None:
    runs = bake_off(drawn_trace(), MACHINE, [24], ["lru", "oracle"], {})
    lines = table(list(rows(runs, drawn_trace(), MACHINE)))
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "-" in lines[1].split() and "100.0%" in lines[2].split()
