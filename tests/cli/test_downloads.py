"""Commands that need text: no weights of a hub id are downloaded for a model that has none."""

import pytest

from tests.helpers.fake_hub import NAME, FakeHub


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\nsat on\n")
    return file


@pytest.fixture
def commands(prompts, tmp_path):
    """The arguments that each takes behind the model."""
    return {
        "generate": ["--prompt", "the cat", "--max-tokens", "4", "--expert-slots", "25%"],
        "chat": [],
        "trace": ["--prompts", prompts, "--out", tmp_path / "t.safetensors", "--max-tokens", "4"],
        "evaluate": ["--prompts", prompts, "--dry-run"],
    }


@pytest.mark.parametrize("command", ["generate", "chat", "trace", "evaluate"])
def test_a_model_without_a_tokenizer(duoserve, textless_folder, commands, command, tmp_path, monkeypatch):
    hub = FakeHub(textless_folder, tmp_path / "snapshot", monkeypatch)
    ran = duoserve(command, NAME, *commands[command])
    assert (ran.code, ran.out, hub.weights) == (1, "", [])
    assert f"{NAME} has no tokenizer.json, which text needs" in ran.err


def test_a_model_without_a_chat_template(duoserve, model_folder, tmp_path, monkeypatch):
    hub = FakeHub(model_folder, tmp_path / "snapshot", monkeypatch)
    ran = duoserve("chat", NAME)
    assert (ran.code, ran.out, hub.weights) == (1, "", [])
    assert f"{NAME} has no chat template" in ran.err


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_a_model_that_has_text_is_downloaded(duoserve, model_folder, commands, command, tmp_path, monkeypatch):
    hub = FakeHub(model_folder, tmp_path / "snapshot", monkeypatch)
    ran = duoserve(command, NAME, *commands[command])
    assert (ran.code, ran.err) == (0, "")
    assert hub.weights == ["model.safetensors"]
