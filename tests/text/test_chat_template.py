"""Chat templates: equal to transformers' rendering, and harmless whatever they are."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pytest

from duoserve.errors import CheckpointError, ClosedError, DuoServeError, RequestError
from duoserve.server.settings import ServerSettings
from duoserve.text.chat_template import SECONDS, START_SECONDS, ChatTemplate

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who's <there>? é 日本 "},
    {"role": "assistant", "content": 'Nay, "answer" me.'},
    {"role": "user", "content": "Long live the king!"},
]
INSTRUCT = """{%- if messages[0].role == 'system' %}{% set told = messages[0].content %}{% set rest = messages[1:] -%}
{%- else %}{% set told = '' %}{% set rest = messages %}{% endif -%}
{{ bos_token }}{% for message in rest %}
    {%- set odd = (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {%- if odd %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if message.role == 'user' %}[INST] {{ told ~ ' ' if loop.first and told }}{{ message.content | trim }} [/INST]
    {%- else %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
MARKED = """{% macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{% set state = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% set state.count = state.count + 1 %}
{{ turn(message.role, message.content) }}
{% endfor %}
{{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':'), sort_keys=true) }}
{{ {'b': 1, 'a': {'ü': 2}} | tojson(true, 1, (';', '='), true) }}
{{ state.count }} {{ {'é': [1, '<']} | tojson }} {{ {'a': 1} | tojson(indent=2) }} {{ strftime_now('%Y') | length }}
{% if tools is none and add_generation_prompt %}<|im_start|>assistant{% endif %}
"""
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}

Make = Callable[..., ChatTemplate]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """The template of a folder with these files, closed in the end."""
    made: list[ChatTemplate] = []

    def from_files(jinja: str | None = None, older: Any = None, **config: Any) -> ChatTemplate:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL | config))
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_text(jinja)
        if older is not None:
            (tmp_path / "chat_template.json").write_text(json.dumps(older))
        found = ChatTemplate.load(tmp_path)
        assert found is not None
        made.append(found)
        return found

    yield from_files
    for template in made:
        template.close()


@pytest.mark.parametrize("template", [INSTRUCT, MARKED], ids=["instruct", "marked"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equal_to_transformers(template: str, add_generation_prompt: bool, make: Make) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template(
        conversations=[TALK],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    ours = make(template)
    assert [ours.render(TALK, add_generation_prompt) for _ in range(2)] == [expected[0]] * 2


def test_where_it_is_found(make: Make, tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    assert make(chat_template=named).render([]) == "named"
    assert make(chat_template=[{"name": ["x"], "template": "y"}, named[1]]).render([]) == "named"
    assert make(chat_template="plain").render([]) == "plain"
    assert make(chat_template="plain", older={"chat_template": "older"}).render([]) == "older"
    assert make("a file {{ eos_token }}", chat_template="plain").render([]) == "a file </s>"


def test_a_malformed_one_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat_template is a int"):
        make(chat_template=7)
    with pytest.raises(CheckpointError, match="chat_template is a dict"):
        make(chat_template=[{"name": "default", "template": {}}])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(CheckpointError, match="more than the 1048576"):
        ChatTemplate.load(tmp_path)


def test_what_it_refuses_is_said(make: Make) -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        make(INSTRUCT).render([TALK[1], TALK[3]])
    with pytest.raises(RequestError, match="unexpected"):
        make("{{ 1 + }}").render([])
    with pytest.raises(RequestError, match="no JSON"):
        make("ok").render([{"role": "user", "content": object()}])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", f"more than {SECONDS:g} s"),
        ("{{ 'a' * 2000000000 }}", "MiB"),
        ("{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}", "MiB"),
        ("{% for i in range(90000) %}0123456789abcdef{% endfor %}", "more than 1048576 characters"),
        ("{{ 9 ** (9 ** 9) }}", f"more than {SECONDS:g} s"),
    ],
    ids=["loops", "long text", "doubled text", "much text", "a large number"],
)
def test_what_takes_too_much_ends_and_the_next_is_served(template: str, why: str, make: Make) -> None:
    begun = time.monotonic()
    hungry = make(template)
    with pytest.raises(RequestError, match=re.escape(why)):
        hungry.render([])
    assert time.monotonic() - begun < 10
    hungry._template = "still {{ bos_token }}"
    assert hungry.render([]) == "still <s>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ ('{0.__globals__[json]}' | attr('format'))(strftime_now) }}",  # jinja2 3.1.5 writes it
    ],
)
def test_the_sandbox_holds(template: str, make: Make) -> None:
    with pytest.raises(RequestError, match="cannot be used"):
        make(template).render([])


def test_jinja2_may_be_where_an_isolated_interpreter_does_not_look(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a user's site or on PYTHONPATH; what else is there takes nothing's place, nor another one where it looks."""
    venv.create(tmp_path / "bare", with_pip=False)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    for package in (jinja2, markupsafe):
        (site / f"{package.__name__}.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit(1)")
    for package in (jinja2, markupsafe):
        (elsewhere / package.__name__).symlink_to(Path(package.__file__).parent)
        monkeypatch.setattr(package, "__file__", str(elsewhere / package.__name__ / "__init__.py"))
    assert make("{{ bos_token | e }}").render([]) == "&lt;s&gt;"


@pytest.mark.parametrize("version", ["3.1.2", "2.11.3", "3.1", "3.0.10"])
def test_a_jinja2_whose_sandbox_does_not_hold_is_refused(
    version: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja2, "__version__", version)
    with pytest.raises(DuoServeError, match=rf"jinja2 {version} is installed.*install jinja2 3\.1\.6 or") as failed:
        make("ok").render([])
    assert not isinstance(failed.value, RequestError)


@pytest.mark.parametrize("version", ["3.1.6", "3.1.10", "3.2", "4.0.0rc1"])
def test_a_later_jinja2_serves(version: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja2, "__version__", version)
    assert make("ok").render([]) == "ok"


def test_a_process_that_does_not_start_is_no_fault_of_the_request(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(DuoServeError, match="renders chat templates") as failed:
        make("ok").render([])
    assert not isinstance(failed.value, RequestError)
    monkeypatch.undo()
    assert make("ok").render([]) == "ok"


def test_a_process_that_somebody_ended_is_started_anew(make: Make) -> None:
    template = make("ok")
    assert template.render([]) == "ok"
    assert template._process is not None
    template._process.kill()
    template._process.wait()
    assert template.render([]) == "ok"


def in_a_fork(work: Callable[[], str]) -> str:
    """What ``work`` gives in a forked child of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], 20)
        return os.read(reader, 100).decode() if ready else "it hangs"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)


def test_a_forked_child_renders_by_itself(make: Make) -> None:
    template = make("{{ messages[0].content }}")

    def rendered(content: str) -> str:
        return template.render([{"role": "user", "content": content}])

    def in_the_child() -> str:
        said = rendered("b") + rendered("c")
        template.close()
        return said

    assert rendered("a") == "a"
    process = template._process
    assert in_a_fork(in_the_child) == "bc"
    assert rendered("d") == "d" and template._process is process


def test_a_child_that_is_forked_during_an_answer_does_not_wait_for_it(make: Make) -> None:
    long = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"
    template = make(f"{{% if messages %}}{long}{{% endif %}}ok")
    assert template.render([]) == "ok"
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(template.render, [{"role": "user", "content": ""}])
        time.sleep(0.1)
        assert not slow.done()
        assert in_a_fork(lambda: template.render([])) == "ok"
        with pytest.raises(RequestError, match="it takes more than"):
            slow.result()


def test_an_interrupt_on_the_terminal_is_not_for_the_process(make: Make) -> None:
    """Ctrl-C goes to all of the terminal's foreground group."""
    template = make("ok")
    assert template.render([]) == "ok"
    process = template._process
    assert process is not None and os.getpgid(process.pid) != os.getpgid(0)
    assert template.render([]) == "ok" and template._process is process


@pytest.mark.parametrize("number", [0, 2], ids=["the start", "a conversation"])
def test_who_interrupts_an_answer_leaves_it_to_nobody_else(
    number: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, numbers = subprocess.Popen, count()

    def interrupted(*args: Any, **how: Any) -> subprocess.Popen[str]:
        process = start(*args, **how)
        read = process.stdout.readline

        def readline() -> str:
            if next(numbers) == number:
                raise KeyboardInterrupt
            return read()

        process.stdout.readline = readline
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    template, rendered = make("{{ messages[0].content }}"), []
    for content in "abc":
        with suppress(KeyboardInterrupt):
            rendered.append(template.render([{"role": "user", "content": content}]))
    assert rendered == (["b", "c"] if number == 0 else ["a", "c"])


def test_closed_it_is_closed(make: Make) -> None:
    template = make("ok")
    assert template.render([]) == "ok"
    process = template._process
    template.close()
    template.close()
    assert process is not None and process.poll() is not None
    with pytest.raises(ClosedError):
        template.render([])


def test_a_start_that_takes_too_long_is_not_taken_for_a_long_prompt() -> None:
    assert ServerSettings.text_s > START_SECONDS
