"""From the messages of a conversation to a prompt, by the checkpoint's template."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from duoserve.errors import CheckpointError, ClosedError, DuoServeError, RequestError
from duoserve.files.positional import is_there, read_capped
from duoserve.files.strict_json import read_object
from duoserve.text import chat_sandbox
from duoserve.text.tokenizer_config import TOKENIZER_CONFIG, read_tokenizer_config, special_tokens

TEMPLATE_BYTES = 1 << 20
SECONDS = 2.0  # real templates take a thousandth of this
START_SECONDS = 8.0  # for a fresh interpreter on a busy machine; less than a server waits for the prompt (`text_s`)
LEAST_JINJA2 = (3, 1, 6)  # templates can escape the sandbox of older ones (CVE-2024-56326, CVE-2025-27516)
# An isolated interpreter ignores the user's site and PYTHONPATH, and might find another jinja2. So it gets the two
# packages that are in use here, and no other module of their folders.
START = """
import runpy, sys
from importlib import machinery, util

script, *folders = sys.argv[1:]
for name, folder in zip(("markupsafe", "jinja2"), folders, strict=True):
    spec = machinery.PathFinder.find_spec(name, [folder])
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
runpy.run_path(script, run_name="__main__")
"""


class ChatTemplate:
    """A checkpoint's template and its special tokens. Any thread may render, but only one does at a time.

    The template runs in a process of its own (chat_sandbox.py), which is started when it is first needed, and killed
    if a template takes more than ``SECONDS``. ``close`` ends it. A forked child of the program starts its own.
    """

    def __init__(self, template: str, tokens: Mapping[str, str]) -> None:
        self._template = template
        self._special_tokens = dict(tokens)
        self._locks: dict[int, threading.Lock] = {}  # by process id: a lock that a child inherits may never be released
        self._process: subprocess.Popen[str] | None = None
        self._asker = os.getpid()  # the process that has started it
        self._inherited: list[subprocess.Popen[str] | None] = []  # kept: to free their pipes takes locks as well
        self._closed = False

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of ``chat_template.jinja``, else ``chat_template.json`` or ``tokenizer_config.json``, or None.

        Of several templates with names, it is the one called "default". Raises CheckpointError if it is malformed.
        """
        config = read_tokenizer_config(folder)
        template = _template(folder, config)
        return None if template is None else cls(template, special_tokens(config))

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt that ``messages`` make, each of which has "role" and "content".

        Raises RequestError if the template refuses them, or takes too much time or memory, and a bare DuoServeError if
        its process does not start, or if jinja2 is older than LEAST_JINJA2.
        """
        variables = self._special_tokens | {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            line = json.dumps({"template": self._template, "variables": variables})
        except (TypeError, ValueError) as error:
            raise RequestError(f"the messages are no JSON: {error}") from error
        with self._turn():
            reply = self._asked(line)
        if "error" in reply:
            raise RequestError(f"the model's chat template cannot be used for these messages: {reply['error']}")
        return reply["text"]

    def close(self) -> None:
        """Ends the process; calling it again does nothing."""
        with self._turn():
            self._closed = True
            self._kill()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The only turn in this process for the block, which begins without what a forked child has inherited."""
        me = os.getpid()
        with self._locks.setdefault(me, threading.Lock()):
            if self._asker != me:
                self._inherited.append(self._process)
                self._process, self._asker = None, me
            yield

    def _asked(self, line: str) -> dict[str, str]:
        """The process's answer to ``line``; kills the process if it takes too long."""
        if self._closed:
            raise ClosedError("the chat template was used after close()")
        if self._process is not None and self._process.poll() is not None:  # something else has ended it
            self._kill()
        process = self._process or self._started()
        reply = self._reply(process, line, SECONDS)
        if reply is None:
            return {"error": f"it takes more than {SECONDS:g} s or {chat_sandbox.MEMORY_BYTES >> 20} MiB"}
        return reply

    def _started(self) -> subprocess.Popen[str]:
        """A new process that has answered once, so that its start does not count as the template's time."""
        _check_jinja2(jinja2.__version__)
        folders = [str(Path(file).parents[1]) for file in (markupsafe.__file__, jinja2.__file__)]
        command = [sys.executable, "-I", "-c", START, chat_sandbox.__file__, *folders]
        try:
            self._process = process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # so that Ctrl-C reaches only this process, which closes the other
            )
        except OSError as error:
            raise DuoServeError(f"the process that renders chat templates cannot be started ({error})") from error
        if self._reply(process, json.dumps({"template": "", "variables": {}}), START_SECONDS) is None:
            raise DuoServeError(
                f"the process that renders chat templates died, or said nothing for {START_SECONDS:g} s, at its start: "
                "see whether jinja2 is still where it was, and whether the machine is overloaded"
            )
        return process

    def _reply(self, process: subprocess.Popen[str], line: str, seconds: float) -> dict[str, str] | None:
        """The answer to ``line``; None if none comes in time.

        Without an answer, also after an interrupt, the process is killed: a late answer would go to the next ``line``.
        """
        assert process.stdin is not None and process.stdout is not None
        reply: dict[str, str] | None = None
        limit = threading.Timer(seconds, process.kill)
        try:
            limit.start()
            process.stdin.write(line + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
            reply = json.loads(said) if said.endswith("\n") else None
        except (OSError, ValueError):
            pass
        finally:
            limit.cancel()
            if reply is None:
                self._kill()
        return reply

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _check_jinja2(version: str) -> None:
    """Raises DuoServeError if this version's sandbox is not safe."""
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < LEAST_JINJA2:
        least = ".".join(map(str, LEAST_JINJA2))
        raise DuoServeError(
            f"jinja2 {version} is installed, whose sandbox chat templates can get out of: "
            f"install jinja2 {least} or newer (pip install -U jinja2), and start again"
        )


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path, older = folder / "chat_template.jinja", folder / "chat_template.json"
    if is_there(path):
        return _decoded(read_capped(path, TEMPLATE_BYTES), path)
    found, where = config.get("chat_template"), folder / TOKENIZER_CONFIG
    if is_there(older):
        found, where = read_object(older, TEMPLATE_BYTES).get("chat_template"), older
    if isinstance(found, list):
        named = [one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[-1] if named else None
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{where}: chat_template is a {type(found).__name__}, but must be text")
    return found


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error.reason}); download the file again") from error
