"""Predictors in files: ``NAME.safetensors`` has the arrays, ``NAME.json`` beside it the model and the quality.

Arrays are checked by their names, which end in their shape: L MoE layers, E experts, F direct features, X inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from duoserve.errors import CheckpointError, TraceError
from duoserve.files.positional import read_capped
from duoserve.files.strict_json import read_object
from duoserve.files.whole import check_writable, refused_as, write_whole
from duoserve.predictors.activation_matrix import ActivationMatrixPredictor
from duoserve.predictors.affinity import AffinityPredictor
from duoserve.predictors.base import RowPredictor
from duoserve.predictors.learned import DIRECT, PATH_INPUTS, LayerNetwork, LearnedPredictor
from duoserve.predictors.lookahead import LookaheadPredictor
from duoserve.predictors.paper import PaperPredictor
from duoserve.predictors.popularity import PopularityPredictor
from duoserve.scheduling.plan import ModelShape
from duoserve.traces.trace import TraceMeta

FORMAT = "duoserve predictor 1"
MAX_BYTES = 1 << 30
MAX_JSON_BYTES = 1 << 24  # enough for the marks of half a million prompts
# The predictors that are made of tables, with the arrays that their constructors take.
TABLES: dict[str, tuple[type[RowPredictor], tuple[str, ...]]] = {
    "popularity": (PopularityPredictor, ("popularity_LE",)),
    "affinity": (AffinityPredictor, ("popularity_LE", "affinity_LEE")),
    "activation-matrix": (ActivationMatrixPredictor, ("matrices_MLE",)),
    "lookahead": (LookaheadPredictor, ("popularity_LE", "slopes_L", "offsets_L")),
}
Arrays = dict[str, np.ndarray]


def save_predictor(predictor: RowPredictor, path: Path, notes: Mapping[str, Any]) -> None:
    """Writes ``path`` (named .safetensors) and its JSON; ``notes`` say what it was trained on and how good it is."""
    meta = predictor.meta
    about = {
        "format": FORMAT,
        "kind": predictor.name,
        "fingerprint": meta.fingerprint,
        "layers": list(meta.layers),
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
    }
    data = safetensors.numpy.save(_arrays(predictor))
    binding = {"arrays": _digest(data), "trained_on": sorted(predictor.trained_on)}
    with refused_as(TraceError, f"{path}: cannot be written"):
        write_whole(path, data)
        write_whole(notes_path(path), f"{json.dumps(about | dict(notes) | binding, indent=1)}\n".encode())


def check_place(path: Path) -> None:
    """Raises TraceError if ``save_predictor`` cannot write to ``path``, before there is a predictor."""
    with refused_as(TraceError, f"{path}: cannot be written"):
        for file in (path, notes_path(path)):
            check_writable(file)


def load_predictor(path: Path, fingerprint: str | None = None) -> RowPredictor:
    """The predictor in ``path``; raises TraceError if it is malformed, or not of the model with ``fingerprint``."""
    try:
        about = read_object(notes_path(path), MAX_JSON_BYTES)
        data = read_capped(path, MAX_BYTES)
        arrays = safetensors.numpy.load(data)
    # ValueError: a path without a name. KeyError: numbers that numpy does not have, such as bfloat16.
    except (CheckpointError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise TraceError(f"{path}: cannot be read as a predictor ({error!r})") from error
    meta = _meta(about, path)
    if fingerprint is not None:
        check_model(meta, fingerprint, path)
    try:
        predictor = _made(str(about["kind"]), meta, _finite(arrays))
        predictor.trained_on = frozenset(map(str, about.get("trained_on", ())))
    except (LookupError, TypeError, ValueError) as error:
        raise TraceError(f"{path}: is not a whole predictor ({error}); train it again") from error
    if about.get("arrays", digest := _digest(data)) != digest:
        raise TraceError(f"{path}: is not what {notes_path(path).name} is about; train it again")
    return predictor


def _digest(data: bytes) -> str:
    """What tells that one of the two files is another predictor's: they are written one after the other."""
    return blake2b(data, digest_size=16).hexdigest()


def check_model(meta: TraceMeta, fingerprint: str, predictor: object) -> None:
    """Raises TraceError, which names ``predictor``, if its ``meta`` is not of the model with this ``fingerprint``."""
    if meta.fingerprint != fingerprint:
        raise TraceError(
            f"{predictor}: is the predictor of another model (fingerprint {meta.fingerprint:.16}, this model's is "
            f"{fingerprint:.16}); train one on a trace of this model"
        )


def check_shape(meta: TraceMeta, shape: ModelShape, predictor: object) -> None:
    """Raises TraceError, which names ``predictor``, if its ``meta`` has other layers or experts than ``shape``."""
    if meta.shape != shape:
        raise TraceError(f"{predictor}: is the predictor of {_words(meta.shape)}, not {_words(shape)}; train it again")


def _words(shape: ModelShape) -> str:
    return f"top-{shape.top_k} of {shape.num_experts} experts in layers {list(shape.layers)}"


def notes_path(path: Path) -> Path:
    """The path of the JSON that belongs to the predictor in ``path``."""
    return path.with_suffix(".json")


def _arrays(predictor: RowPredictor) -> Arrays:
    if isinstance(predictor, LearnedPredictor):
        return {
            f"{place}.{distance}.{name}": array
            for (place, distance), network in predictor.networks.items()
            for name, array in network._asdict().items()
        }
    if isinstance(predictor, PaperPredictor):
        arrays = {"popularity_LE": predictor.popularity_LE, "affinity_LEE": predictor.affinity_LEE}
        for number, pair in enumerate(zip(predictor.weights, predictor.biases, strict=True)):
            arrays |= {f"{number}.weight": pair[0], f"{number}.bias": pair[1]}
        return arrays
    return {name: getattr(predictor, name) for name in TABLES[predictor.name][1]}


def _finite(arrays: Arrays) -> Arrays:
    """The arrays in float32; ValueError for one with values that this cannot hold, or that are no numbers."""
    with np.errstate(over="ignore"):
        floats = {name: array.astype(np.float32) for name, array in arrays.items()}
    for name, array in floats.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has values that are not finite")
    return floats


def _made(kind: str, meta: TraceMeta, arrays: Arrays) -> RowPredictor:
    """The predictor of these arrays; raises LookupError if one is missing, ValueError if one has the wrong shape."""
    if kind == LearnedPredictor.name:
        return LearnedPredictor(meta, _networks(meta, arrays))
    if kind == PaperPredictor.name:
        tables = [_checked(name, arrays, meta) for name in ("popularity_LE", "affinity_LEE")]
        return PaperPredictor(meta, tables[0], tables[1], *_perceptron(meta, arrays))
    made, names = TABLES[kind]
    return made(meta, *(_checked(name, arrays, meta) for name in names))


def _networks(meta: TraceMeta, arrays: Arrays) -> dict[tuple[int, int], LayerNetwork]:
    """The networks by place and distance. The horizon follows from the number of arrays, as a name may claim any."""
    horizon = len(arrays) // (len(meta.layers) * len(LayerNetwork._fields))
    places = [(place, distance) for distance in range(1, horizon + 1) for place in range(len(meta.layers))]
    return {(place, distance): _network(f"{place}.{distance}.", arrays, meta) for place, distance in places}


def _network(prefix: str, arrays: Arrays, meta: TraceMeta) -> LayerNetwork:
    network = LayerNetwork(*(_checked(f"{prefix}{name}", arrays, meta) for name in LayerNetwork._fields))
    widths = {network.inner_XH.shape[1], len(network.inner_bias_H), len(network.outer_HE)}
    if len(widths) > 1:
        raise ValueError(f"{prefix}*_H have different widths {sorted(widths)}")
    return network


def _perceptron(meta: TraceMeta, arrays: Arrays) -> tuple[list[np.ndarray], list[np.ndarray]]:
    depth = sum(name.endswith(".weight") for name in arrays)
    weights = [arrays[f"{number}.weight"] for number in range(depth)]
    biases = [arrays[f"{number}.bias"] for number in range(depth)]
    widths = [3 * meta.num_experts, *(weight.shape[-1] for weight in weights)]
    fits = [
        w.shape == (widths[n], widths[n + 1]) and b.shape == w.shape[1:]
        for n, (w, b) in enumerate(zip(weights, biases, strict=True))
    ]
    if not depth or not all(fits) or widths[-1] != meta.num_experts:
        raise ValueError(f"the perceptron's widths {widths} do not fit {meta.num_experts} experts")
    return weights, biases


def _checked(name: str, arrays: Arrays, meta: TraceMeta) -> np.ndarray:
    """The array; raises ValueError unless it has the shape that its name says.

    Letters without a fixed size stand for any size but 0.
    """
    sizes = {"L": len(meta.layers), "E": meta.num_experts, "F": DIRECT, "1": 1}
    sizes["X"] = (DIRECT + PATH_INPUTS) * meta.num_experts
    array, letters = arrays[name], name.rpartition("_")[2]
    alike = array.ndim == len(letters) and array.size > 0
    if not alike or any(size != sizes.get(x, size) for x, size in zip(letters, array.shape, strict=True)):
        raise ValueError(f"{name} has the shape {array.shape} where the model has {sizes}")
    return array


def _meta(about: Mapping[str, Any], path: Path) -> TraceMeta:
    try:
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        layers = tuple(int(layer) for layer in about["layers"])
        num_experts, top_k = int(about["num_experts"]), int(about["top_k"])
        if not layers or not 0 < top_k <= num_experts:
            raise ValueError(f"{len(layers)} layers, top-{top_k} of {num_experts} experts")
        return TraceMeta(str(about["fingerprint"]), layers, num_experts, top_k)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TraceError(f"{notes_path(path)}: is not of this version ({error!r}, wanted {FORMAT!r})") from error
