"""Text: streamed pieces add up to the whole for every kind of vocabulary, and stop strings cut wherever pieces end."""

import itertools
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from duoserve.errors import CheckpointError, DuoServeError, RequestError
from duoserve.text.tokenizer import IncrementalDecoder, StopStrings, Tokenizer
from tests.helpers.small_tokenizers import byte_level_tokenizer, llama_tokenizer, stripping_tokenizer

ALPHABET = st.sampled_from("aeé the\n日😀👍🏽▁ ")


def word_tokenizer(decoder) -> tokenizers.Tokenizer:
    vocab = {token: n for n, token in enumerate(["[UNK]", "▁the", "cat", "##s", "▁", "."])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


BYTE_LEVEL, LLAMA = byte_level_tokenizer(), llama_tokenizer()
CONTEXTUAL = [decoders.Metaspace(), decoders.WordPiece(cleanup=True), None]


def streamed(tokenizer: tokenizers.Tokenizer, token_ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(Tokenizer(tokenizer))
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.flush()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=40))
def test_any_byte_level_sequence_streams_to_its_decoded_text(token_ids):
    assert "".join(streamed(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(st.text(ALPHABET, max_size=20))
def test_encoded_text_streams_back_without_a_replacement_character(text):
    for tokenizer in (BYTE_LEVEL, LLAMA):
        token_ids = Tokenizer(tokenizer).encode(text)
        pieces = streamed(tokenizer, token_ids)
        assert "".join(pieces) == tokenizer.decode(token_ids) == Tokenizer(tokenizer).decode(token_ids)
        assert not any("\ufffd" in piece for piece in pieces)


BYTE_RUNS = st.text(st.sampled_from("é日😀\nA"), min_size=1, max_size=3).map(
    lambda text: [LLAMA.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
)
WORD = st.integers(259, LLAMA.get_vocab_size() + 2).map(lambda token_id: [token_id])
SPECIAL_ID = st.integers(0, 2).map(lambda token_id: [token_id])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(WORD, WORD, SPECIAL_ID, BYTE_RUNS), max_size=20))
def test_any_llama_sequence_with_whole_characters_streams_to_its_decoded_text(parts):
    token_ids = [token_id for part in parts for token_id in part]
    assert "".join(streamed(LLAMA, token_ids)) == LLAMA.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, LLAMA.get_vocab_size()), max_size=30))
def test_streamed_and_whole_text_agree_on_broken_bytes_too(token_ids):
    assert "".join(streamed(LLAMA, token_ids)) == Tokenizer(LLAMA).decode(token_ids)


@pytest.mark.parametrize("decoder", CONTEXTUAL)
def test_spaces_that_depend_on_the_token_before(decoder):
    tokenizer = word_tokenizer(decoder)
    draw = random.Random(0)
    for _ in range(200):
        token_ids = [draw.randrange(6) for _ in range(draw.randrange(8))]
        assert "".join(streamed(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_an_emoji_comes_with_its_last_byte():
    for tokenizer in (BYTE_LEVEL, LLAMA):
        names = ["ð", "Ł", "ĳ", "į"] if tokenizer is BYTE_LEVEL else ["<0xF0>", "<0x9F>", "<0x91>", "<0x8D>"]
        token_ids = [tokenizer.token_to_id(name) for name in names]
        assert streamed(tokenizer, token_ids) == ["", "", "", "👍", ""]
        assert streamed(tokenizer, token_ids[:3]) == ["", "", "", "\ufffd"]


def test_broken_bytes_lose_no_valid_neighbour():
    token_ids = [LLAMA.token_to_id(token) for token in ("<0xC3>", "<0xA9>", "<0xFF>", "▁cat", "<0xE6>", "▁the")]
    assert "".join(streamed(LLAMA, token_ids)) == "é\ufffd cat\ufffd the"


def test_a_text_goes_on_behind_another():
    def behind(prompt, tokens, tokenizer=LLAMA):
        decoder = IncrementalDecoder(Tokenizer(tokenizer), [tokenizer.token_to_id(token) for token in prompt])
        return "".join(decoder.push(tokenizer.token_to_id(token)) for token in tokens)

    assert behind(["▁cat"], ["▁the"]) == behind(["▁cat", "</s>"], ["▁the"]) == behind(["<0xC3>"], ["▁the"]) == " the"
    assert behind([], ["▁the"]) == behind(["<s>"], ["▁the"]) == "the"
    assert behind(["▁the"], ["s", "▁the"]) == "s the"
    assert behind(["the"], ["the", "<s>"], BYTE_LEVEL) == behind([], ["the", "<s>"], BYTE_LEVEL) == "the"


def test_work_per_token_does_not_grow(monkeypatch):
    """Not one join of the streamed text covers more than two tokens, however long the output is."""
    tokenizer = Tokenizer(LLAMA)
    widths = []
    join = tokenizer.join
    tokenizer.join = lambda tokens: widths.append(len(tokens)) or join(tokens)
    decoder = IncrementalDecoder(tokenizer)
    for _ in range(500):
        decoder.push(LLAMA.token_to_id("▁cat"))
        decoder.push(LLAMA.token_to_id("<0xFF>"))
    assert max(widths) == 2
    assert len(widths) <= 2 * 1000


def test_special_tokens_are_added_as_the_post_processor_says_and_not_shown():
    tokenizer = Tokenizer(LLAMA)
    assert tokenizer.encode("the")[0] == LLAMA.token_to_id("<s>")
    assert tokenizer.decode(tokenizer.encode("the cat</s>")) == "the cat"
    assert Tokenizer(BYTE_LEVEL).encode("the") == BYTE_LEVEL.encode("the", add_special_tokens=False).ids


def saved(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def deepseek_tokenizer() -> tokenizers.Tokenizer:
    """Its tokenizer.json has a post-processor that adds nothing."""
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


ADDED = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False}
FLAGS = [{}, *({"add_bos_token": bos, "add_eos_token": eos} for bos in (True, False, None) for eos in (True, False))]


@pytest.mark.parametrize("bos", ["<s>", ADDED, None, "</s>"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_special_tokens_that_only_the_config_adds_are_those_of_transformers(tmp_path, flags, bos):
    """As in DeepSeek's files. It is given the flags, for it drops them in ``from_pretrained`` since its version 5."""
    folder = saved(tmp_path, deepseek_tokenizer(), {"bos_token": bos, "eos_token": "</s>"} | flags)
    named = {"bos_token": "<s>" if bos is ADDED else bos, "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named, **flags)
    ours = Tokenizer.load(folder)
    assert ours.encode("the cat") == theirs.encode("the cat")
    assert ours.encode("the cat", add_special=False) == theirs.encode("the cat", add_special_tokens=False)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_special_tokens_of_the_tokenizer_itself_stay(tmp_path, flags):
    folder = saved(tmp_path, llama_tokenizer(), {"bos_token": "<s>", "eos_token": "</s>"} | flags)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert Tokenizer.load(folder).encode("the cat") == theirs.encode("the cat") == LLAMA.encode("the cat").ids


def test_a_token_to_add_that_the_tokenizer_does_not_have_is_refused(tmp_path):
    folder = saved(tmp_path, deepseek_tokenizer(), {"bos_token": "<begin>", "add_bos_token": True})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json adds '<begin>', which is none of its tokens"):
        Tokenizer.load(folder)


def test_a_tokenizer_config_that_says_a_thing_twice_is_refused(tmp_path):
    folder = saved(tmp_path, deepseek_tokenizer(), {})
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "add_bos_token": false}')
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: not valid JSON .*'add_bos_token' stands 2 times"
    ):
        Tokenizer.load(folder)


def test_truncation_and_padding_left_in_the_file_are_not_applied(tmp_path):
    tokenizer = byte_level_tokenizer()
    whole = tokenizer.encode("the cat sat on the mat").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("the cat sat on the mat") == whole


def test_a_missing_tokenizer_is_none_and_a_broken_one_is_refused(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer that can be used"):
        Tokenizer.load(tmp_path)


def test_a_panic_in_the_tokenizer_is_a_request_error(capfd):
    tokenizer = byte_level_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(RequestError, match="the tokenizer cannot encode this text"):
        Tokenizer(tokenizer).encode("a" * 40 + "b")
    assert "panicked" in capfd.readouterr().err, "this text no longer makes the tokenizer panic: find another"


def test_a_panic_in_the_decoder_is_an_error_that_is_not_the_requests(capfd):
    with pytest.raises(DuoServeError, match=r"the tokenizer cannot decode \['w1', 'z'\]: ") as raised:
        Tokenizer(stripping_tokenizer(2, 4)).decode([0, 1, 2, 3])
    assert not isinstance(raised.value, RequestError)
    assert "panicked" in capfd.readouterr().err, "this token no longer makes the tokenizer panic: find another"


def test_text_that_is_no_unicode_is_a_request_error():
    with pytest.raises(RequestError, match="cannot encode"):
        Tokenizer(BYTE_LEVEL).encode("\ud800")


@pytest.mark.parametrize("token_id", [-1, 2**40])
def test_a_number_that_is_no_token_id_is_a_request_error(token_id):
    with pytest.raises(RequestError, match=f"{token_id} is not a token id"):
        Tokenizer(BYTE_LEVEL).decode([token_id])


def test_ctrl_c_stays_ctrl_c():
    class Interrupted:
        def encode_batch(self, texts, **how):
            raise KeyboardInterrupt

    tokenizer = Tokenizer(BYTE_LEVEL)
    tokenizer._tokenizer = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def cut(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stop = StopStrings(stops)
    shown = "".join([stop.push(piece) for piece in pieces])
    return shown + ("" if stop.found else stop.flush()), stop.found


def first_completed(stops: list[str], text: str) -> tuple[str, str | None]:
    """What the cut means, read off the definition: the first position at which some stop string has just ended."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500)
@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
)
def test_stops_cut_where_the_first_is_completed_however_the_text_is_cut(stops, pieces):
    assert cut(stops, pieces) == first_completed(stops, "".join(pieces))


def test_only_what_may_begin_a_stop_string_is_held_back():
    stop = StopStrings(["\nEND", "xyz"])
    assert [stop.push(piece) for piece in ("one x", "y two\n", "EN", "D three", "more")] == [
        "one ",
        "xy two",
        "",
        "",
        "",
    ]
    assert stop.found == "\nEND"


def test_flush_gives_back_what_did_not_become_a_stop():
    stop = StopStrings(["END"])
    assert (stop.push("the EN"), stop.flush(), stop.flush()) == ("the ", "EN", "")


def test_other_threads_run_while_a_long_text_is_encoded():
    beats, over = [], threading.Event()

    def beat():
        while not over.wait(0.002):
            beats.append(time.perf_counter())

    beating = threading.Thread(target=beat)
    beating.start()
    began = time.perf_counter()
    Tokenizer(BYTE_LEVEL).encode("the cat and the king " * 50_000)
    ended = time.perf_counter()
    over.set()
    beating.join()
    inside = [began, *(one for one in beats if began < one < ended), ended]
    silence = max(later - earlier for earlier, later in itertools.pairwise(inside))
    assert silence < 0.4 * (ended - began), f"nothing else ran for {silence:.2f} s"
