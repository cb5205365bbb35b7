"""``duoserve chat`` on a small real model: the template's prompt, the conversation that grows, and its commands."""

import io
import shutil
import sys

import pytest

from duoserve.moe_model import MoEModel
from duoserve.sampling import Sampler, SamplingParams
from duoserve.text.tokenizer import Tokenizer
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.small_tokenizers import channel_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
GREEDY = ("--max-tokens", "6", "--temperature", "0", "--expert-slots", "25%")


@pytest.fixture(scope="module")
def chat_folder(model_folder, tmp_path_factory):
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')  # no answer ends by itself
    return folder


@pytest.fixture
def answers(chat_folder, tmp_path):
    """What the library says to each prompt."""

    def ask(*prompts):
        with MoEModel.from_pretrained(chat_folder, cache_dir=tmp_path / "expected") as model:
            return [model.generate(prompt, SamplingParams(max_tokens=6, temperature=0.0)).text for prompt in prompts]

    return ask


def say(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_what_was_said_is_in_the_next_prompt(duoserve, chat_folder, answers, monkeypatch):
    say(monkeypatch, "hi", "", "more")
    (first,) = answers("[user] hi\n[assistant] ")
    (second,) = answers(f"[user] hi\n[assistant] {first}\n[user] more\n[assistant] ")
    ran = duoserve("chat", chat_folder, *GREEDY)
    assert (ran.code, ran.out) == (0, f"{first}\n{second}\n")


def test_reset_forgets_all_but_the_system_and_exit_ends(duoserve, chat_folder, answers, monkeypatch):
    say(monkeypatch, "hi", "/reset", "hi", "/exit", "never said")
    (answer,) = answers("[system] be kind\n[user] hi\n[assistant] ")
    ran = duoserve("chat", chat_folder, *GREEDY, "--system", "be kind")
    assert (ran.code, ran.out) == (0, f"{answer}\n{answer}\n")


def test_an_answer_may_fill_the_context_and_it_is_said_that_it_was_cut(duoserve, chat_folder, tmp_path, monkeypatch):
    """More than the 64 tokens that others get; of --max-tokens, no more than those."""
    say(monkeypatch, "hi")
    with MoEModel.from_pretrained(chat_folder, max_context=128, cache_dir=tmp_path) as model:
        prompt = model.tokenizer.encode("[user] hi\n[assistant] ", add_special=False)
        whole = model.generate(prompt, max_tokens=128 - len(prompt), temperature=0.0)
    assert whole.finish_reason == "length" and len(whole.token_ids) > 64
    ran = duoserve("chat", chat_folder, "--temperature", "0", "--expert-slots", "25%", "--max-context", "128")
    assert (ran.code, ran.out) == (0, f"{whole.text}\n")
    assert f"cut off after {len(whole.token_ids)} tokens: the context is full" in ran.err
    say(monkeypatch, "hi")
    assert "cut off after 6 tokens: raise --max-tokens" in duoserve("chat", chat_folder, *GREEDY).err


def test_a_prompt_that_leaves_no_room_is_refused_and_the_next_is_answered(duoserve, chat_folder, answers, monkeypatch):
    say(monkeypatch, "hi " * 200, "hi")
    (answer,) = answers("[user] hi\n[assistant] ")
    ran = duoserve("chat", chat_folder, "--temperature", "0", "--max-context", "128")
    assert ran.out.startswith(answer) and "prompt tokens" in ran.err


def test_an_answer_that_a_stop_string_ends_is_not_said_to_be_cut(duoserve, chat_folder, answers, monkeypatch):
    say(monkeypatch, "hi")
    (answer,) = answers("[user] hi\n[assistant] ")
    ran = duoserve("chat", chat_folder, *GREEDY, "--stop", answer[-1])
    assert ran.out == answer[: answer.index(answer[-1])] + "\n"
    assert "cut off" not in ran.err


def test_thoughts_of_an_answer_are_shown_but_not_in_the_next_prompt(duoserve, tmp_path, monkeypatch):
    folder, tokenizer = save_mixtral(tmp_path / "model", vocab_size=296), channel_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    thought, final = "<|channel|>analysis<|message|>ok?<|end|><|start|>assistant", "<|channel|>final<|message|>"
    drawn = iter(Tokenizer(tokenizer).encode(f"{thought}{final}cat</s>{final}mat</s>"))
    monkeypatch.setattr(Sampler, "__call__", lambda *_: next(drawn))
    prompts, stream = [], MoEModel.stream
    monkeypatch.setattr(MoEModel, "stream", lambda self, ids, *a: prompts.append(ids) or stream(self, ids, *a))
    say(monkeypatch, "hi", "more")
    ran = duoserve("chat", folder)
    assert (ran.code, ran.out) == (0, "analysisok?assistantfinalcat\nfinalmat\n")
    assert Tokenizer(tokenizer).decode(prompts[1]) == "[user] hi\n[assistant] cat\n[user] more\n[assistant] "


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seen", [True, False])
def test_the_prompt_is_shown_on_the_terminal_alone(duoserve, chat_folder, answers, monkeypatch, seen):
    (answer,) = answers("[user] hi\n[assistant] ")
    monkeypatch.setattr("sys.stdin", Terminal("hi\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: seen)
    ran = duoserve("chat", chat_folder, *GREEDY)
    assert ran.out == (f"> {answer}\n> " if seen else f"{answer}\n")
    assert ran.err.count("> ") == (0 if seen else 2)


def test_what_is_no_text_is_refused(duoserve, chat_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    ran = duoserve("chat", chat_folder, *GREEDY)
    assert (ran.code, ran.out) == (1, "")
    assert "what stdin says is not utf-8 text" in ran.err


@pytest.mark.parametrize(
    ("folder", "missing"),
    [("model_folder", "chat template: use duoserve generate"), ("textless_folder", "tokenizer.json, which text needs")],
)
def test_a_model_that_cannot_chat_is_refused_before_it_is_loaded(duoserve, request, monkeypatch, folder, missing):
    say(monkeypatch, "hi")
    monkeypatch.setattr(MoEModel, "from_pretrained", None)
    ran = duoserve("chat", request.getfixturevalue(folder))
    assert (ran.code, ran.out) == (1, "")
    assert f"has no {missing}" in ran.err
