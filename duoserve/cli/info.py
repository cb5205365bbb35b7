"""``duoserve info``: architecture, bytes by part, and what fits, without reading a weight."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from duoserve.byte_sizes import format_bytes
from duoserve.cli.inventory import Inventory, take_inventory
from duoserve.cli.options import MODEL_HELP, Subparsers, add_parser
from duoserve.kv_cache import kv_bytes_per_token
from duoserve.models.described import DescribedModel, described

EXAMPLES = """\
  duoserve info bard
  duoserve info mistralai/Mixtral-8x7B-v0.1 --json
"""


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "info", "show what a model is made of and how much of it fits in memory", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Prints the inventory to stdout."""
    model = described(args.model)
    inventory = take_inventory(model)
    if args.json:
        print(json.dumps({"architecture": _architecture(model), "source": model.source, **asdict(inventory)}))
    else:
        print("\n".join(_tables(model, inventory)))


def _architecture(model: DescribedModel) -> dict[str, Any]:
    config = model.config
    shared = config.blocks.moe.shared
    return {
        "model_type": config.model_type,
        "dtype": str(config.dtype).removeprefix("torch."),
        "quantization": None if config.quantization is None else str(config.quantization),
        "num_layers": config.num_layers,
        "moe_layers": len(config.moe_layers),
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "hidden_size": config.hidden_size,
        "expert_intermediate_size": config.expert_intermediate_size,
        "shared_expert_size": None if shared is None else shared.intermediate_size,
        "attention": str(config.blocks.attention),
        "kv_bytes_per_token": kv_bytes_per_token(config, config.dtype),
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
    }


def _tables(model: DescribedModel, inventory: Inventory) -> list[str]:
    return [
        str(model.folder),
        *(f"  {name:<26}{'-' if value is None else value}" for name, value in _architecture(model).items()),
        f"  {'parameters':<26}{_count(inventory.parameters)}, {_count(inventory.active_parameters)} for a token",
        "",
        f"bytes on disk, by {model.source}",
        *_parts(inventory),
        "",
        f"experts: {inventory.total_experts}, {inventory.active_experts} for a token, "
        f"{inventory.expert_bytes} bytes each on disk, "
        f"{inventory.slot_bytes} in a slot ({format_bytes(inventory.slot_bytes)})",
        "",
        "expert memory     slots   share of the experts",
        *(f"{format_bytes(fit.memory_bytes):>13}{fit.slots:>10}{fit.share:>23.1%}" for fit in inventory.fits),
    ]


def _parts(inventory: Inventory) -> list[str]:
    total = sum(inventory.bytes_by_part.values())
    rows = [*inventory.bytes_by_part.items(), ("total", total)]
    return [f"  {part:<12}{format_bytes(nbytes):>14}{nbytes / total:>8.1%}" for part, nbytes in rows]


def _count(elements: int) -> str:
    return f"{elements / 1e9:.2f} B" if elements >= 1e9 else f"{elements / 1e6:.2f} M"
