"""Small tokenizers of the kinds that checkpoints come with, made in the test."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = ["the cat sat on the mat.", "The café  naïve\n\nrôle", "日本語の文章", "😀 😃👍🏽 ok"] * 3
SPECIAL = ["<s>", "</s>"]


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    return tokenizer


def llama_tokenizer() -> Tokenizer:
    """As SentencePiece models are converted: U+2581 for spaces, characters that are missing as byte tokens."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁the", "the", "▁cat", "s", "é", ".", "t", "h", "e", "c", "a"]
    vocab = {token: n for n, token in enumerate(["<unk>", *SPECIAL, *byte_tokens, *words])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocab["th"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def stripping_tokenizer(token_id: int, size: int) -> Tokenizer:
    """Words, and one token that makes ``tokenizers`` panic where it is decoded: its decoder strips both ends of it."""
    vocab = {"z" if n == token_id else f"w{n}": n for n in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="z"))
    tokenizer.decoder = decoders.Strip("z", 1, 1)
    return tokenizer


def channel_tokenizer() -> Tokenizer:
    """Byte-level, with the marks of gpt-oss's answers."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"])
    return tokenizer
