"""Texts that the included bard makes and is asked about: streams, stop strings, and a play it has not seen."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from duoserve import Completion, MoEModel, RequestError, SamplingParams
from duoserve.text.tokenizer import Tokenizer
from tests.helpers.checkpoints import BARD


@pytest.fixture(scope="module")
def bard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=tmp_path_factory.mktemp("packs")) as model:
        yield model


def returned(stream: Generator[str, None, Completion]) -> Completion:
    try:
        while True:
            next(stream)
    except StopIteration as end:
        return end.value


def test_bard_streams_what_generate_returns(bard: MoEModel) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=4)
    whole = bard.generate("ROMEO.\n", params)
    assert "".join(bard.stream("ROMEO.\n", params)) == whole.text
    assert returned(bard.stream("ROMEO.\n", params)) == replace(whole, stats=ANY)
    assert whole.text and whole.text.isprintable() is False  # it has lines


def test_a_stop_string_ends_the_text_before_it(bard: MoEModel) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0)
    text = bard.generate("To be, or", params).text
    assert text is not None
    stop = text[10:13]
    held = bard.generate("To be, or", params, stop=stop)
    assert held.text == text[: text.index(stop)] and held.finish_reason == "stop"
    assert "".join(bard.stream("To be, or", params, stop=stop)) == held.text


def test_a_stop_string_that_the_last_token_completes_is_why_it_ends(bard: MoEModel) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0)
    free = bard.generate("To be, or", params)
    assert free.text is not None and free.finish_reason == "length"
    held = bard.generate("To be, or", params, stop=free.text[-2:])
    assert (held.text, held.finish_reason, held.token_ids) == (free.text[:-2], "stop", free.token_ids)


@pytest.mark.parametrize("meanwhile", ["another call", "close"])
def test_what_happens_while_the_last_of_a_stream_is_read_is_not_in_its_figures(meanwhile: str, tmp_path: Path) -> None:
    with MoEModel.from_pretrained("bard", expert_slots="25%", cache_dir=tmp_path) as bard:
        params = SamplingParams(max_tokens=6, temperature=0.0)
        text = bard.generate("To be, or", params).text
        assert text
        stream = bard.stream("To be, or", params, stop=text[-1] + "\0")  # which holds the last character back
        read = ""
        while read != text:
            read += next(stream)
        if meanwhile == "close":
            bard.close()
        else:
            bard.generate("ROMEO.", max_tokens=1)
        done = returned(stream)
        assert done.text == text and done.stats.output_tokens == 6 and len(done.stats.itl_s) == 5


def test_an_abandoned_stream_leaves_the_model_usable(bard: MoEModel) -> None:
    stream = bard.stream("To be, or", max_tokens=40)
    next(stream)
    with pytest.raises(RequestError, match="earlier stream is still open"):
        bard.generate("To be, or")
    stream.close()
    assert bard.generate("To be, or", max_tokens=3).token_ids


# From Macbeth, which bard was not trained on.
HELD_OUT = """\
MACBETH.
She should have died hereafter;
There would have been a time for such a word.--
To-morrow, and to-morrow, and to-morrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
Life's but a walking shadow; a poor player,
That struts and frets his hour upon the stage,
And then is heard no more: it is a tale
Told by an idiot, full of sound and fury,
Signifying nothing.
"""


def test_bard_predicts_a_play_it_has_not_seen(bard: MoEModel) -> None:
    """In bits per byte: 8 knows nothing, about 4.5 only how frequent letters are, bard about 2 over whole plays."""
    tokenizer = Tokenizer.load(BARD)
    assert tokenizer is not None
    ids = torch.tensor([0, *tokenizer.encode(HELD_OUT)])
    nats = torch.nn.functional.cross_entropy(bard.forward(ids.tolist())[:-1], ids[1:], reduction="sum").item()
    assert nats / math.log(2) / len(HELD_OUT.encode()) < 2.5
