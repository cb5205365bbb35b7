"""``duoserve pack``: writes the experts of a checkpoint to one file, from which slots are filled by direct reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from duoserve.byte_sizes import format_bytes
from duoserve.cli.options import MODEL_HELP, Subparsers, add_dtype, add_parser, add_quantize
from duoserve.errors import ConfigError, RequestError
from duoserve.experts.pack_folder import is_packed, pack_path
from duoserve.experts.pack_format import PackHeader
from duoserve.experts.packing import write_pack
from duoserve.experts.quantizing import QuantizingStore
from duoserve.models.opened import OpenedModel, opened
from duoserve.moe_model import MoEModel
from duoserve.perplexity import WINDOW, TextScore, check_length, score, scored_ids
from duoserve.text.tokenizer import Tokenizer

EXAMPLES = """\
  duoserve pack bard
  duoserve pack ./my-mixtral --out /fast-disk/duoserve
  duoserve pack ./my-mixtral --quantize int4 --text held-out.txt
  DUOSERVE_CACHE=/fast-disk/duoserve duoserve generate ./my-mixtral --memory 12GiB --prompt "Once"
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "pack", "write a model's experts to the pack that they are read from", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the cache folder to write to (default: $DUOSERVE_CACHE, else ~/.cache/duoserve)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="with --quantize: say what that does to the perplexity of this text; scores the model as it is too, whose "
        "experts are then packed as well where they do not all fit in RAM",
    )
    add_dtype(parser)
    add_quantize(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Makes the pack unless it is there already, and prints where it is and what quantization has cost."""
    if args.text is not None and args.quantize is None:
        raise ConfigError("--text says what --quantize does to a text: give both")
    with opened(args.model) as model:
        text = None if args.text is None else _text(args.text)
        token_ids = [] if text is None else _token_ids(model, text)
        _pack(model, args)
    if text is not None:
        before, after = (_score(args, quantize, token_ids) for quantize in (None, args.quantize))
        print("\n".join(_compared(before, after, len(text.encode()))))


def _pack(model: OpenedModel, args: argparse.Namespace) -> None:
    dtype = model.dtype(args.dtype)
    layout = model.layout(dtype, args.quantize)
    path, fingerprint = pack_path(model.checkpoint, layout, args.out), model.checkpoint.fingerprint()
    changed_ns = model.checkpoint.changed_ns
    header = PackHeader.for_layout(layout, model.pack_layers, model.config.num_experts, fingerprint)
    size = f"{len(model.experts)} experts, {format_bytes(len(model.experts) * layout.slot_bytes)}, {path}"
    if is_packed(path, header, changed_ns):
        print(f"already packed: {size}")
        return
    store = model.expert_store(dtype, args.quantize)
    if not write_pack(store, model.experts, path, fingerprint, progress=True, changed_ns=changed_ns):
        print(f"already packed: {size}")  # by another process, for which this one has waited
        return
    print(f"packed: {size}")
    if isinstance(store, QuantizingStore):
        off = f"are off by {store.weight_error:.3%} (root mean square)" if store.weight_error else "keep every bit"
        print(f"{layout.name}: weights {off}")


def _text(path: Path) -> str:
    """The file's text. It is read once and whole, as it may be a pipe."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text: {path} cannot be read as text in UTF-8: {error}") from error
    if not text:
        raise RequestError(f"--text: {path} is empty")
    return text


def _token_ids(model: OpenedModel, text: str) -> list[int]:
    """The text's tokens behind the token that begins a text; raises RequestError if there are fewer than two."""
    tokenizer = Tokenizer.load(model.checkpoint.folder)
    if tokenizer is None:
        raise RequestError(f"--text: {model.checkpoint.folder} has no tokenizer.json")
    ids = scored_ids(tokenizer.encode(text), model.config.bos_token_id)
    check_length(ids)
    return ids


def _score(args: argparse.Namespace, quantize: str | None, token_ids: list[int]) -> TextScore:
    with MoEModel.from_pretrained(
        args.model, dtype=args.dtype, max_context=WINDOW, quantize=quantize, cache_dir=args.out
    ) as model:
        return score(model, token_ids)


def _compared(before: TextScore, after: TextScore, nbytes: int) -> list[str]:
    figures = (
        ("perplexity", before.perplexity, after.perplexity),
        ("bits per byte", before.bits_per_byte(nbytes), after.bits_per_byte(nbytes)),
    )
    return [f"{name}: {old:.4f} -> {new:.4f} ({new / old - 1:+.3%})" for name, old, new in figures]
