"""``duoserve trace``."""

import json

import pytest

from duoserve.traces.trace_file import open_trace


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("To be\n\nOr not\n")
    return path


def test_prompts_become_a_trace(duoserve, model_folder, prompts, tmp_path):
    argv = ["trace", model_folder, "--prompts", prompts, "--out", tmp_path / "t.safetensors", "--max-tokens", "4"]
    ran = duoserve(*argv, "--json")
    assert ran.code == 0
    trace = open_trace(tmp_path / "t.safetensors")
    assert len(trace) == 2 and [request.num_prompt for request in trace] == [5, 6]
    assert json.loads(ran.out) == {
        "requests": 2,
        "tokens": trace.num_tokens,
        "layers": 3,
        "bytes": (tmp_path / "t.safetensors").stat().st_size,
        "fingerprint": trace.meta.fingerprint,
    }
    assert "exists" in duoserve(*argv).err
    assert duoserve(*argv, "--resume").out.startswith(f"{tmp_path / 't.safetensors'}: 2 requests")


def test_a_seed_makes_the_same_trace_with_other_memory(duoserve, model_folder, prompts, tmp_path):
    for name, memory in (("a", []), ("b", ["--expert-slots", "6", "--host-memory", "1MiB"])):
        ran = duoserve(
            "trace", model_folder, "--prompts", prompts, "--out", tmp_path / name, "--max-tokens", "6", *memory
        )
        assert ran.code == 0, ran.err
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("content", "fault"), [(None, "cannot be read"), ("\n \n", "has no prompt")])
def test_a_file_without_prompts(duoserve, model_folder, tmp_path, content, fault):
    path = tmp_path / "prompts"
    if content is not None:
        path.write_text(content)
    ran = duoserve("trace", model_folder, "--prompts", path, "--out", tmp_path / "t")
    assert (ran.code, fault in ran.err) == (1, True)
    assert not (tmp_path / "t").exists()
