"""``duoserve pack``: the experts of a checkpoint into one file that slots are filled from by direct reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from duoserve.cli.options import MODEL_HELP, Subparsers, add_dtype, add_parser
from duoserve.errors import CheckpointError
from duoserve.experts.budget import format_bytes
from duoserve.experts.disk_store import DiskStore
from duoserve.experts.layout import ExpertLayout
from duoserve.experts.pack_format import DTYPES
from duoserve.experts.packing import pack_path, write_pack
from duoserve.models.opened import OpenedModel, opened

EXAMPLES = """\
  duoserve pack bard
  duoserve pack ./my-mixtral --out /fast-disk/duoserve
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
    add_dtype(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Makes the pack unless it is there already, and prints where it is."""
    with opened(args.model) as model:
        layout = model.layout(model.config.dtype if args.dtype == "auto" else DTYPES[args.dtype])
        path = pack_path(model.checkpoint, layout, args.out)
        made = not _is_packed(model, layout, path)
        if made:
            store = model.expert_store(layout.dtype)
            write_pack(store, model.experts, path, store.fingerprint(), progress=True)
        size = format_bytes(len(model.experts) * layout.slot_bytes)
        print(f"{'packed' if made else 'already packed'}: {len(model.experts)} experts, {size}, {path}")


def _is_packed(model: OpenedModel, layout: ExpertLayout, path: Path) -> bool:
    if not path.exists():
        return False
    try:
        DiskStore(path, layout, model.pack_layers, model.config.num_experts, model.checkpoint.fingerprint()).close()
    except CheckpointError:
        return False
    return True
