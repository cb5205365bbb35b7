"""Options that would change nothing are refused, not passed over."""

import pytest

COMMANDS = {
    "--horizon": ["train-predictor", "t.safetensors", "--kind", "paper", "--out", "p.safetensors", "--horizon", "2"],
    "--precision and --seed": ["replay", "t.safetensors", "--precision", "7", "--seed", "0"],
    "--max-tokens": ["evaluate", "bard", "--trace", "t.safetensors", "--max-tokens", "3"],
    "--measure": ["plan", "mixtral-8x7b", "--hardware", "rtx4090@pcie3x8,a6000", "--measure"],
    "--trials": ["bench", "serve", "--url", "http://127.0.0.1:1", "--trials", "3"],
    "--texts": ["bench", "cpu", "--quick", "--texts", "texts"],
}


@pytest.mark.parametrize("options", COMMANDS)
def test_an_unused_option_is_an_error(duoserve, options):
    ran = duoserve(*COMMANDS[options])
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"duoserve: error: {options}: ")
