"""Amounts of memory: what people write is read, and what they are shown can be given back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duoserve.byte_sizes import format_bytes, parse_bytes
from duoserve.config import EngineConfig
from duoserve.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GiB", 4 * GIB),
        ("500MB", 500_000_000),
        (" 1.5 gib ", 3 * GIB // 2),
        ("0", 0),
        ("17", 17),
        ("17b", 17),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("1TiB", 2**40),
        (12, 12),
        (np.int64(12), 12),
    ],
)
def test_parse_bytes(text, nbytes):
    found = parse_bytes(text)
    assert found == nbytes and type(found) is int


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "GiB",
        "4G",
        "-1GiB",
        "4 GiB GiB",
        "nan",
        "inf",
        "1e9",
        "٤GiB",
        "0x10",
        "9" * 5000,
        "9999999TiB",
        -1,
        1.5,
        True,
    ],
)
def test_parse_bytes_refuses_nonsense_with_examples(nonsense):
    with pytest.raises(ConfigError, match=r"not an amount of memory.*'4GiB'"):
        parse_bytes(nonsense)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (5 * GIB // 2, "2.50 GiB"), (2**41, "2.00 TiB")],
)
def test_format_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


@given(st.integers(0, 2**45))
def test_format_bytes_parses_back_to_within_a_hundredth(nbytes):
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.006)


def test_a_config_takes_sizes_as_people_write_them() -> None:
    assert type(EngineConfig.of(memory=np.int64(4096), max_context=np.int64(64)).max_context) is int
    assert EngineConfig.of() == EngineConfig.of(host_memory=None) == EngineConfig()
    assert EngineConfig.of(memory="2KiB", host_memory="0") == EngineConfig(memory=2048, host_memory=0)
    assert EngineConfig.of(expert_memory=4096, device="cpu") == EngineConfig(expert_memory=4096, device="cpu")
    for wrong in ({"memory": "auto"}, {"host_memory": "much"}, {"memory": 1, "expert_memory": 1}):
        with pytest.raises(ConfigError):
            EngineConfig.of(**wrong)
