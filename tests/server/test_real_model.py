"""The server over a real engine: the answers of the library, faults on the way, and the process from start to end."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from duoserve.cli import main, serve
from duoserve.engine import Engine
from duoserve.moe_model import MoEModel
from duoserve.passes import Passes
from duoserve.service.async_engine import AsyncEngine
from duoserve.service.worker import Worker
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fakes import PATIENCE_S
from tests.helpers.small_tokenizers import byte_level_tokenizer
from tests.server.conftest import serving, wait_ready

PROMPTS = ("To be, or", "Enter HAMLET", "My lord, the", "What ho!")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(cache):
    """What the library makes of each prompt by itself."""
    with MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=cache) as model:
        return [model.generate(prompt, max_tokens=8, temperature=0.0) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def bard(cache):
    with serving(lambda: AsyncEngine(MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=cache))) as server:
        wait_ready(server)
        yield server


def test_answers_are_the_librarys_alone_and_side_by_side(bard, alone):
    ours = openai.OpenAI(base_url=f"{bard.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(prompt):
        return ours.completions.create(model="fake", prompt=prompt, max_tokens=8, temperature=0)

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        together = list(threads.map(ask, PROMPTS))
    one_by_one = [ask(prompt) for prompt in PROMPTS]
    for done in (together, one_by_one):
        assert [one.choices[0].text for one in done] == [one.text for one in alone]
        assert [one.usage.completion_tokens for one in done] == [len(one.token_ids) for one in alone]


def test_a_stream_has_the_same_text_and_a_stop_string_ends_it(bard, alone):
    body = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "stream": True}

    def text(**fields):
        with bard.http.stream("POST", "/v1/completions", json=body | fields) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        return "".join(one["text"] for one in choices), choices[-1]["finish_reason"]

    assert text() == (alone[0].text, "length")
    stop = alone[0].text[4:7]
    assert text(stop=stop) == (alone[0].text.split(stop)[0], "stop")


def test_a_chat_is_the_models_own_template_rendered(tmp_path):
    folder = save_mixtral(tmp_path, vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    template = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}<assistant>"
    (folder / "chat_template.jinja").write_text(template)
    asked = {"model": "fake", "messages": [{"role": "user", "content": "What ho!"}], "max_tokens": 6, "temperature": 0}
    with MoEModel.from_pretrained(folder, max_context=512) as model:
        prompt = model.tokenizer.encode("<user>What ho!<assistant>", add_special=False)
        alone = model.generate(prompt, max_tokens=6, temperature=0.0)
    with serving(lambda: AsyncEngine(MoEModel.from_pretrained(folder, max_context=512))) as server:
        wait_ready(server)
        chat = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60).chat.completions
        whole = chat.create(**asked)
        assert (whole.choices[0].message.content, whole.usage.prompt_tokens) == (alone.text, len(prompt))
        chunks = list(chat.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == alone.text
        assert chunks[-1].usage.completion_tokens == len(alone.token_ids)


def test_a_client_that_leaves_frees_the_engine(bard):
    body = {"prompt": "a", "max_tokens": 3000, "temperature": 0, "stream": True, "ignore_eos": True}
    before = given_up(bard)
    with bard.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: when it goes, so does the connection
        next(lines)
        assert bard.http.get("/status").json()["service"]["running"] == 1
    until = time.monotonic() + 20
    while bard.http.get("/status").json()["service"]["running"]:
        assert time.monotonic() < until
    assert given_up(bard) == before + 1


def given_up(server):
    return server.http.get("/status").json()["service"]["finished"].get("abort", 0)


def test_choices_of_a_request_share_their_passes(bard, monkeypatch):
    prefill, sizes = Passes.start_prefill, []
    submit, step, asked, all_asked = Worker.submit, Engine.step, [], threading.Event()

    def counted(worker, request, task):
        answer = submit(worker, request, task)
        asked.append(request)
        if len(asked) == 8:
            all_asked.set()
        return answer

    def patient(engine):
        all_asked.wait(PATIENCE_S)
        all_asked.set()
        return step(engine)

    def noted(passes, chosen, interruptible):
        sizes.append(len(chosen))
        return prefill(passes, chosen, interruptible)

    monkeypatch.setattr(Worker, "submit", counted)
    monkeypatch.setattr(Engine, "step", patient)
    monkeypatch.setattr(Passes, "start_prefill", noted)
    answer = bard.complete(prompt=PROMPTS[1], n=8, max_tokens=2, temperature=0)
    assert len({one["text"] for one in answer.json()["choices"]}) == 1
    assert sum(sizes) == 8 and len(sizes) <= 2


def test_log_probabilities_and_experts_are_told(bard):
    body = {"prompt": PROMPTS[0], "max_tokens": 3, "temperature": 0, "logprobs": 5}
    found = bard.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert [max(top.values()) for top in found["top_logprobs"]] == found["token_logprobs"]  # greedy: the likeliest
    text = bard.http.get("/metrics").text
    hits = next(
        line for line in text.splitlines() if line.startswith("duoserve:expert_hits_total{") and "decode" in line
    )
    assert float(hits.split()[-1]) > 0


def test_a_prompt_beyond_the_context_is_a_400(bard):
    answer = bard.complete(prompt=[5] * 100_000, max_tokens=1)
    assert answer.status_code == 400 and "maximum context length" in answer.json()["error"]["message"]


@contextmanager
def process(cache, *options, **environment):
    """The command as a shell runs it; yields it and its URL, which it prints once it is ready."""
    start = "import sys; from duoserve.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "serve", "bard", "--expert-slots", "25%", "--port", "0", *options]
    env = os.environ | {"DUOSERVE_CACHE": str(cache)} | environment
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as running:
        try:
            line = running.stderr.readline()
            assert "serving on http://127.0.0.1:" in line, line + running.stderr.read()
            yield running, line.split("serving on ")[1].split()[0]
        finally:
            running.kill()


def test_sigterm_ends_a_stream_with_an_error_event_and_the_process_with_0(cache):
    body = {"prompt": "a", "max_tokens": 3000, "temperature": 0, "stream": True, "ignore_eos": True}
    options = ("--shutdown-timeout", "0.5")
    with process(cache, *options, DUOSERVE_API_KEY="s3cret") as (running, url), httpx.Client(base_url=url) as http:
        assert http.get("/v1/models").status_code == 401
        key = {"Authorization": "Bearer s3cret"}
        assert http.get("/v1/models", headers=key).json()["data"][0]["id"] == "bard"
        with http.stream("POST", "/v1/completions", json=body, headers=key) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
        assert rest[-1] == "data: [DONE]"
        assert running.wait(10) == 0
        assert running.stderr.read() == ""


def test_what_cannot_be_loaded_or_had_is_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    def failed(*options):
        code = main(["serve", *options])
        return code, capsys.readouterr().err

    code, err = failed(str(tmp_path / "nothing"), "--port", "0")
    assert code == 1 and err.startswith("duoserve: error: ") and err.count("\n") == 1
    code, err = failed("bard", "--memory", "1MiB", "--port", "0")
    assert code == 1 and "memory" in err and err.count("\n") == 1
    code, err = failed("bard", "--slo-ttft-ms", "0")
    assert code == 1 and "must be more than 0" in err
    code, err = failed("bard", "--slo-ttft-ms", "inf", "--host", "no such host")
    assert code == 1 and "finite" in err
    monkeypatch.setenv("DUOSERVE_SLO_TPOT_MS", "-5")
    code, err = failed("bard")
    assert code == 1 and "-5.0 ms" in err


def test_a_wrong_value_in_the_environment_is_wrong_usage_of_serve_alone(monkeypatch, capsys):
    monkeypatch.setenv("DUOSERVE_ADMISSION", "never")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "bard"])
    assert ended.value.code == 2 and "argument --admission: 'never' is none of late, strict" in capsys.readouterr().err
    assert main(["info", "bard"]) == 0


def test_every_flag_is_a_variable_too(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # no name is cut at the end of a line
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    flags = set(re.findall(r"^ +--([a-z-]+)", shown, re.MULTILINE))
    assert len(flags) > 15 and {f"DUOSERVE_{flag.upper().replace('-', '_')}" for flag in flags} == set(
        re.findall(r"\[(DUOSERVE_\w+)\]", shown)
    )
    for value, meant in (("1", True), ("false", False)):
        monkeypatch.setenv("DUOSERVE_INVARIANT", value)
        assert parsed("serve", "bard").invariant is meant
    monkeypatch.setenv("DUOSERVE_INVARIANT", "maybe")
    with pytest.raises(SystemExit):
        parsed("serve", "bard")
    assert "argument --invariant: 'maybe' is none of" in capsys.readouterr().err


def test_a_wrong_variable_is_named_and_a_services_address_is_no_port(monkeypatch, capsys):
    monkeypatch.setenv("DUOSERVE_PORT", "tcp://10.0.0.1:8000")
    assert parsed("serve").port == 8000
    for name, option in (("DUOSERVE_PORT", "--port"), ("DUOSERVE_MAX_BATCH", "--max-batch")):
        monkeypatch.setenv(name, "many")
        with pytest.raises(SystemExit):
            parsed("serve")
        said = capsys.readouterr().err
        assert f"argument {option}: " in said and "'many'" in said and name in said
        assert 5 in vars(parsed("serve", option, "5")).values()
        with pytest.raises(SystemExit):
            parsed("serve", option, "few")
        assert name not in capsys.readouterr().err
        monkeypatch.delenv(name)


def parsed(*words):
    parser = argparse.ArgumentParser()
    serve.add_command(parser.add_subparsers())
    return parser.parse_args(words)


def test_nothing_of_the_server_is_imported_for_other_commands():
    code = (
        "import sys, duoserve.cli, duoserve; "
        "sys.exit(any(name.split('.')[0] in {'starlette', 'uvicorn', 'prometheus_client'} for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
