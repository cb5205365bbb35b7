"""``duoserve generate`` on a small real model: text as it comes, figures as JSON, options that arrive."""

import io
import json
import subprocess

import pytest

from duoserve.cli import generate
from duoserve.cli.app import command_line
from duoserve.cli.options import loading
from duoserve.moe_model import MoEModel
from duoserve.sampling import SamplingParams

GREEDY = ("--prompt", "the cat", "--max-tokens", "12", "--temperature", "0", "--expert-slots", "25%")


@pytest.fixture(scope="module")
def expected(model_folder, tmp_path_factory):
    """What the library says to the same request."""
    cache = tmp_path_factory.mktemp("cache")
    with MoEModel.from_pretrained(model_folder, cache_dir=cache) as model:
        return model.generate("the cat", SamplingParams(max_tokens=12, temperature=0.0))


def test_the_text_comes_out_and_nothing_else(duoserve, model_folder, expected):
    ran = duoserve("generate", model_folder, *GREEDY)
    assert (ran.code, ran.out) == (0, expected.text + "\n")


def test_json_tells_text_tokens_and_figures(duoserve, model_folder, expected):
    report = json.loads(duoserve("generate", model_folder, *GREEDY, "--json").out)
    assert report.keys() == {"text", "token_ids", "finish_reason", "stats", "model"}
    assert (report["text"], report["token_ids"]) == (expected.text, expected.token_ids)
    assert report["finish_reason"] == expected.finish_reason
    assert report["model"] | {"memory_bytes": 0} == {
        "name": str(model_folder),
        "model_type": "mixtral",
        "policy": "duoserve",
        "experts": 24,
        "slots": 6,
        "slot_bytes": 12288,
        "memory_bytes": 0,
        "host_bytes": 0,
    }
    stats = report["stats"]
    assert stats["output_tokens"] == len(expected.token_ids)
    assert stats["hits_decode"] > 0 < stats["misses_decode"]
    assert stats["bytes_total"] == 12288 * (stats["misses_decode"] + stats["misses_prefill"])


def test_the_prompt_may_come_from_stdin(duoserve, model_folder, expected, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))
    assert duoserve("generate", model_folder, *GREEDY[2:]).out == expected.text + "\n"


def test_a_stdin_that_is_no_text_is_refused(duoserve, model_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    ran = duoserve("generate", model_folder)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("duoserve: error: the prompt on stdin is not utf-8 text")


class FakeModel:
    """Records how it was made and asked."""

    def __init__(self):
        self.loaded, self.asked = {}, []

    def from_pretrained(self, model, **options):
        self.loaded = {"model": model, **options}
        return self

    def stream(self, prompt, params):
        self.asked.append((prompt, params))
        yield from ("one ", "two\n")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def fake(monkeypatch):
    fake = FakeModel()
    monkeypatch.setattr(generate, "MoEModel", fake)
    return fake


def test_without_options_the_librarys_defaults_hold(duoserve, fake):
    assert duoserve("generate", "--prompt", "a").out == "one two\n"
    assert fake.asked == [("a", SamplingParams())]
    given = {name: value for name, value in fake.loaded.items() if value not in (None, "auto", False)}
    assert given == {"model": "bard"}


def test_threads_that_copy_are_handed_on(duoserve, fake):
    duoserve("generate", "--prompt", "a", "--copy-threads", "1")
    assert fake.loaded["copy_threads"] == 1


def test_every_sampling_option_arrives(duoserve, fake):
    params = SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=3,
        stop=("x", "y"),
        ignore_eos=True,
    )
    flags = "--max-tokens 5 --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 3"
    duoserve("generate", "--prompt", "a", *flags.split(), "--stop", "x", "--stop", "y", "--ignore-eos")
    assert fake.asked == [("a", params)]


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("expert_slots", "12", 12),
        ("expert_slots", "25%", "25%"),
        ("expert_memory", "4GiB", "4GiB"),
        ("memory", "12GiB", "12GiB"),
        ("host_memory", "1GiB", "1GiB"),
        ("policy", "lru", "lru"),
        ("predictor", "auto", "auto"),
        ("device", "cpu", "cpu"),
        ("dtype", "float32", "float32"),
        ("max_context", "512", 512),
    ],
)
def test_every_loading_option_arrives(duoserve, fake, model_folder, flag, text, value):
    duoserve("generate", model_folder, "--prompt", "a", f"--{flag.replace('_', '-')}", text)
    assert (fake.loaded["model"], fake.loaded[flag]) == (str(model_folder), value)


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_whoever_runs_a_model_may_name_its_predictor(command):
    args = command_line().parse_args([command, "bard", "--policy", "duoserve", "--predictor", "p.safetensors"])
    assert (loading(args)["policy"], loading(args)["predictor"]) == ("duoserve", "p.safetensors")
    assert loading(command_line().parse_args([command, "bard"]))["predictor"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "nan"], "temperature is nan, but must be a number in 0..100"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--stop", ""], "non-empty strings"),
    ],
)
def test_a_bad_request_is_refused_before_the_model_is_loaded(duoserve, fake, flags, message):
    ran = duoserve("generate", "--prompt", "a", *flags)
    assert ran.code == 1
    assert message in ran.err
    assert fake.loaded == {}


def test_a_model_without_a_tokenizer_is_refused_before_it_is_loaded(duoserve, fake, textless_folder):
    ran = duoserve("generate", textless_folder, "--prompt", "a")
    assert (ran.code, ran.out, fake.loaded) == (1, "", {})
    assert f"{textless_folder} has no tokenizer.json, which text needs" in ran.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert-slots", "2"], "raise expert_slots to at least 3"),
        (["--expert-slots", "some"], "a share of all experts such as '25%'"),
        (["--expert-memory", "4G"], "'4G' is not an amount of memory"),
        (["--expert-memory", "20KiB"], "raise expert_memory to at least 36864 bytes"),
        (["--policy", "magic"], "'magic'"),
        (["--predictor", "none.safetensors"], "none.safetensors"),
        (["--device", "tpu"], "'tpu'"),
        (["--max-context", "4"], "exceed the context"),
    ],
)
def test_a_model_that_cannot_be_loaded_so_is_one_line(duoserve, model_folder, flags, message):
    ran = duoserve("generate", model_folder, "--prompt", "the cat", *flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err.splitlines()[-1]


def test_text_is_written_as_it_comes_and_a_reader_may_leave(duoserve, model_folder, buffered_command):
    flags = ("--prompt", "a", "--max-tokens", "150", "--seed", "1", "--expert-slots", "4", "--policy", "on-demand")
    whole = duoserve("generate", model_folder, *flags).out.encode()
    buffered_command["args"] += ["generate", str(model_folder), *flags]
    with subprocess.Popen(**buffered_command, stdout=subprocess.PIPE, bufsize=0) as running:
        first = running.stdout.read(1 << 16)
        assert 0 < len(first) < len(whole) / 2, "150 tokens did not come in pieces"
        running.stdout.close()
        errors = running.stderr.read()
        assert (running.wait(), errors) == (141, b"")


def test_what_the_terminal_cannot_show_is_replaced(model_folder, buffered_command):
    """The model's tokens are bytes at random, so its text is not ASCII."""
    buffered_command["args"] += ["generate", str(model_folder), "--prompt", "a", "--max-tokens", "20", "--seed", "1"]
    buffered_command["env"]["PYTHONIOENCODING"] = "ascii"
    ran = subprocess.run(**buffered_command, stdout=subprocess.PIPE, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"") and b"?" in ran.stdout
