"""The answer to a text goes on where the text ends, with the space before its first word; a chat's begins anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duoserve.moe_model import MoEModel
from duoserve.sampling import SamplingParams
from duoserve.service.async_engine import AsyncEngine
from tests.helpers.checkpoints import save_mixtral
from tests.server.conftest import Serving, serving, wait_ready

WORDS = [f"w{n}" for n in range(96)]
PROMPT = "w3 w14 w15"


@pytest.fixture(scope="module")
def wordy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model each of whose tokens is a word with the space before it, as SentencePiece models have them."""
    folder = save_mixtral(tmp_path_factory.mktemp("wordy"), vocab_size=len(WORDS))
    tokenizer = Tokenizer(models.WordLevel({f"▁{word}": n for n, word in enumerate(WORDS)}, unk_token="▁w0"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def wordy(wordy_folder: Path) -> Iterator[Serving]:
    with serving(lambda: AsyncEngine(MoEModel.from_pretrained(wordy_folder, max_context=64))) as server:
        wait_ready(server)
        yield server


@pytest.fixture(scope="module")
def model(wordy_folder: Path) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained(wordy_folder, max_context=64) as loaded:
        yield loaded


GREEDY = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "logprobs": 0}


def test_a_completion_can_be_put_behind_its_prompt(wordy: Serving) -> None:
    [choice] = wordy.complete(**GREEDY).json()["choices"]
    words = (PROMPT + choice["text"]).split(" ")
    assert len(words) == 3 + 5 and set(words) <= set(WORDS)
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    ends = [*found["text_offset"][1:], None]
    cut = [choice["text"][begin:end] for begin, end in zip(found["text_offset"], ends, strict=True)]
    assert cut == found["tokens"]


def test_a_streamed_completion_is_the_same_text(wordy: Serving) -> None:
    lines = wordy.complete(**GREEDY, stream=True).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert (
        "".join(chunk["choices"][0]["text"] for chunk in chunks)
        == wordy.complete(**GREEDY).json()["choices"][0]["text"]
    )


def test_a_stop_string_may_begin_with_the_space(wordy: Serving) -> None:
    text = wordy.complete(**GREEDY).json()["choices"][0]["text"]
    [choice] = wordy.complete(**GREEDY, stop=text[: text.index(" ", 1)]).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_a_chats_answer_begins_anew(wordy: Serving) -> None:
    said = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = wordy.post("/v1/chat/completions", said).json()["choices"][0]["message"]["content"]
    assert f" {answer}" == wordy.complete(**GREEDY).json()["choices"][0]["text"]


GREEDILY = SamplingParams(max_tokens=5, temperature=0)


def test_the_library_gives_the_text_that_the_server_gives(wordy: Serving, model: MoEModel) -> None:
    served = wordy.complete(prompt=PROMPT, max_tokens=5, temperature=0).json()["choices"][0]["text"]
    assert served.startswith(" w")
    assert model.generate(PROMPT, GREEDILY).text == served
    assert [done.text for done in model.generate([PROMPT, PROMPT], GREEDILY)] == [served] * 2
    assert "".join(model.stream(PROMPT, GREEDILY)) == served


def test_the_librarys_stop_string_may_begin_with_the_space(model: MoEModel) -> None:
    first_word = WORDS[model.generate(PROMPT, GREEDILY).token_ids[0]]
    done = model.generate(PROMPT, GREEDILY, stop=f" {first_word}")
    assert (done.text, done.finish_reason) == ("", "stop")


def test_the_answer_to_token_ids_begins_anew(model: MoEModel) -> None:
    answer = model.generate(model.encode(PROMPT), GREEDILY).text
    assert f" {answer}" == model.generate(PROMPT, GREEDILY).text


def test_an_engines_answer_to_a_text_goes_on_from_it(wordy_folder: Path, model: MoEModel) -> None:
    async def answer() -> str:
        engine = AsyncEngine(MoEModel.from_pretrained(wordy_folder, max_context=64))
        try:
            return "".join([piece.text async for piece in await engine.submit(PROMPT, GREEDILY)])
        finally:
            await engine.close()

    assert asyncio.run(answer()) == f" {model.generate(model.encode(PROMPT), GREEDILY).text}"
