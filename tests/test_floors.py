"""The rules of the house that a parser can check, on the tree as it stands, and proof that each check bites.

FLOORS is the house from the ground up. A file imports from duoserve only what stands above it in this table, so there
can be no cycle. A new file gets its place here, after all that it imports.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest

FLOORS = """
F0  errors  shared_errors  out_of_memory  callers  torch_modes  openmp  freed_memory  number_checks  byte_sizes
    files/__init__  files/positional  files/whole  files/strict_json  architecture  config  timeline  metrics
F1  kernels/checks  kernels/limits  kernels/matmul  kernels/int4_codes  kernels/bf12  kernels/weights  kernels/host_rows
    kernels/routed_rows  kernels/paging  kernels/reference_dequant  kernels/reference_codes  kernels/reference_small
    kernels/reference_attention  kernels/experts_together  kernels/reference  kernels/reference_copies
    kernels/numerics  kernels/configs  kernels/machine  kernels/dequant  kernels/moe_checks  kernels/route_sort
    kernels/moe_store  kernels/moe_bf12  kernels/moe_gemm  kernels/moe_gemv  kernels/moe_fill  kernels/copies
    kernels/combine  kernels/router_choice  kernels/norm  kernels/rope  kernels/cache_rows  kernels/attention_gqa
    kernels/attention_mla  kernels/triton_ops  kernels/__init__  kernels/recorder  kernels/cuda_graphs
    kernels/attention_together  kernels/compiled/__init__  kernels/compiled/streamed  kernels/compiled/traced
    kernels/compiled/attention_loops  kernels/compiled/decomposed  kernels/compiled/tape  kernels/compiled/inductor
    kernels/compiled/compiler  kernels/compiled/loops  kernels/small_ops  kernels/compiled/ops
    kernels/compiled/token_expert  kernels/compiled/unpacking
F2  experts/__init__  experts/safetensors_header  experts/shards  experts/hub  experts/layout  experts/pack_format
    experts/checkpoint  experts/rows  experts/pinned  experts/pieces  experts/store  experts/formats/__init__
    experts/formats/scratch  experts/formats/codes  experts/formats/fp8  experts/formats/int4
    experts/formats/lanes  experts/formats/awq  experts/formats/gptq  experts/formats/mxfp4  experts/formats/bf12
    experts/formats/expert_row  experts/formats/reading  experts/pack_folder  experts/packing  experts/scale_search
    experts/quantizing  experts/control_groups  experts/host_ram  experts/host_cores  experts/device
    experts/budget  experts/disk_store  experts/slots  experts/tickets  experts/copy_engine  experts/virtual
    experts/streams  experts/cuda_streams  experts/lane_marks  experts/lane_copies  experts/stream_engine
F3  scheduling/__init__  scheduling/source  scheduling/routing  scheduling/predictor  scheduling/plan
    scheduling/prefill  scheduling/decode  scheduling/ranking  scheduling/eviction  scheduling/ghost
    scheduling/guard  scheduling/policies  scheduling/account  scheduling/link_budget  scheduling/foresight
    scheduling/ledger  scheduling/residency  scheduling/spaces  scheduling/lease  scheduling/step_guesses
    scheduling/read_through  scheduling/scheduler  traces/__init__  traces/trace  traces/trace_file
    traces/recorder  traces/synthetic  replaying/__init__  replaying/virtual_readers  replaying/cache_study
    replaying/hardware  replaying/host_time  replaying/foreseen  replaying/scored  replaying/replay
    replaying/bake_off  predictors/__init__  predictors/features  predictors/history  predictors/base
    predictors/popularity  predictors/affinity  predictors/activation_matrix  predictors/lookahead
    predictors/paper  predictors/learned  predictors/examples  predictors/networks  predictors/training
    predictors/quality  predictors/files
F4  models/__init__  models/batch  models/tensors  models/layers  models/rope  models/attention  models/mla
    models/router  models/tap  models/moe  models/transformer  models/parts  models/variants  models/listening
    models/decoder  models/config_fields  models/rope_fields  models/quantization_fields  models/common_fields
    models/expert_names  models/family  models/mixtral  models/qwen3_moe  models/qwen2_moe  models/olmoe
    models/deepseek  models/glm4_moe  models/granite_moe  models/gpt_oss  models/registry  models/stored
    models/opened  models/described  models/gpu_support
F5  interface  sampling  context_limits  text/__init__  text/tokenizer_config  text/tokenizer  text/prompts
    text/channels  text/chat_sandbox  text/chat_template  kv_cache  request  text/writer  passes  batching/__init__
    batching/cost  batching/next_work  batching/traffic  roster  engine  launching/__init__  launching/inputs
    launching/recorded_choices  launching/recorded  launching/event  launching/graph  launching/compiled_experts
    launching/compiled  launching/compiled_prompts  launching/link  launching/launch  loading/__init__
    loading/workspace  loading/memory_needs  loading/placement  loading/recommendation  loading/deciding
    loading/wiring  loading/load  tracing  evaluating  turns  moe_model  service/__init__  service/stream
    service/worker  service/async_engine  perplexity  planning/__init__  planning/model_cards  planning/formats
    planning/sizes  planning/routing_curves  planning/speed  planning/policy_speed  planning/made_up
    planning/rehearsal  planning/rehearsed  planning/planner  planning/measuring  planning/this_machine  __init__
F6  server/__init__  server/backend  server/settings  server/errors  server/fields  server/asking  server/records
    server/token_text  server/answers  server/generation  server/sse  server/http  server/connections  server/host
    server/metrics  server/status  server/preparing  server/endpoints  server/app  server/run  cli/options
    cli/sampling_options  cli/prompts  cli/hardware_option  cli/inventory  cli/generate  cli/chat  cli/info  cli/plots
    cli/plan_plot  cli/plan_report  cli/plan  cli/pack  cli/trace  cli/train_predictor  cli/replay_report  cli/replay
    cli/evaluate  cli/serve  cli/bench_report  loadtest/__init__  loadtest/workload  loadtest/figures  loadtest/events
    loadtest/client  loadtest/measuring  cli/bench_serve  cli/bench  cli/app  cli/__init__
"""
FILES = [word for word in FLOORS.split() if not re.fullmatch(r"F\d", word)]
RANK = {name: rank for rank, name in enumerate(FILES)}

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLERS = {"torch.load", "numpy.load"}
MAPPERS = {
    "torch.from_file",
    "torch.UntypedStorage.from_file",
    "numpy.memmap",
    "numpy.lib.format.open_memmap",
    "safetensors.safe_open",
    "safetensors.torch.load_file",
    "safetensors.torch.load_model",
}
LAZY = {  # imported when asked for: extras, and what takes a second to import
    ("kernels/__init__", "kernels/triton_ops"),
    ("kernels/compiled/compiler", "kernels/compiled/inductor"),
    ("kernels/compiled/ops", "kernels/compiled/inductor"),
    ("cli/serve", "server/run"),
    ("cli/bench_serve", "loadtest/measuring"),
}
IMPORTERS = {"importlib.import_module", "__import__"}
ANONYMOUS_MAPS = "experts/rows"


@dataclass(frozen=True)
class Imported:
    """One name that an import statement brings: ``module`` as written, ``name`` None for ``import module``."""

    module: str
    name: str | None
    alias: str
    node: ast.stmt

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def origin(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"

    @property
    def target(self) -> str:
        """The file of the house that the import runs, as named in FLOORS."""
        for dotted in (self.origin, self.module):
            path = "/".join(dotted.split(".")[1:])
            for name in (path, f"{path}/__init__".lstrip("/")):
                if name in RANK:
                    return name
        return self.origin


def violations(root: Path) -> list[str]:
    """What breaks a rule in ``root``/duoserve: "file:line: rule"."""
    package = root / "duoserve"
    found = []
    for path in sorted(package.rglob("*.py")):
        name = str(path.relative_to(package).with_suffix(""))
        tree = ast.parse(path.read_text(), str(path))
        rules = [order, place, kernel_imports, unsafe_imports, unsafe_uses]
        faults = [fault for rule in rules for fault in rule(name, tree)]
        found += [f"{path.relative_to(root)}:{line}: {message}" for line, message in faults]
    return found


Faults = Iterator[tuple[int, str]]


def order(name: str, tree: ast.Module) -> Faults:
    """Imports only from what stands above in FLOORS."""
    if name not in RANK:
        yield 1, "has no place in FLOORS of tests/test_floors.py"
        return
    for imported in imports(tree):
        if imported.package == "duoserve" and RANK.get(imported.target, len(RANK)) >= RANK[name]:
            yield imported.node.lineno, f"imports {imported.target}, which does not stand above it in FLOORS"


def place(name: str, tree: ast.Module) -> Faults:
    """Imports of the package are absolute statements of the module itself, never hidden in a function, but for LAZY."""
    for imported in imports(tree):
        hidden = imported.package == "duoserve" and imported.node not in tree.body
        if imported.package == "" or (hidden and (name, imported.target) not in LAZY):
            yield imported.node.lineno, "imports from duoserve otherwise than absolutely and at the top"
    for line, used in uses(tree):
        if used in IMPORTERS:
            yield line, f"imports through {used}"


def kernel_imports(name: str, tree: ast.Module) -> Faults:
    """Kernels know torch, triton, each other and the errors."""
    for imported in imports(tree) if name.startswith("kernels/") else ():
        near = imported.target == "errors" or imported.target.startswith("kernels/")
        if not (near if imported.package == "duoserve" else imported.package in KERNELS_MAY_IMPORT):
            yield imported.node.lineno, f"a kernel imports {imported.origin}"


def unsafe_imports(name: str, tree: ast.Module) -> Faults:
    """No pickle; no memory maps but the anonymous ones that slots are made of."""
    for imported in imports(tree):
        if imported.package in PICKLES or imported.origin in UNPICKLERS:
            yield imported.node.lineno, f"imports {imported.origin}, which runs code from files"
        if imported.origin in MAPPERS or (imported.package == "mmap" and name != ANONYMOUS_MAPS):
            yield imported.node.lineno, f"imports {imported.origin}: model files are never mapped"


def unsafe_uses(name: str, tree: ast.Module) -> Faults:
    """The same for what is reached through a module that may be imported."""
    for line, used in uses(tree):
        if used in UNPICKLERS:
            yield line, f"uses {used}, which runs code from files"
        if used in MAPPERS:
            yield line, f"uses {used}: model files are never mapped"
    known = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func, known) == "mmap.mmap" and not is_anonymous(node):
            yield node.lineno, "maps a file: model files are never mapped"


def is_anonymous(mapping: ast.Call) -> bool:
    return bool(mapping.args) and ast.unparse(mapping.args[0]) == "-1"


def imports(tree: ast.Module) -> Iterator[Imported]:
    """Every name that any import statement brings; a relative import has the module ""."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(alias.name, None, alias.asname or alias.name.partition(".")[0], node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = "" if node.level else str(node.module)
                yield Imported(module, alias.name, alias.asname or alias.name, node)


def aliases(tree: ast.Module) -> dict[str, str]:
    """What a name in the file stands for: ``np`` -> ``numpy``."""
    plain = {i.alias: i.origin for i in imports(tree)}
    return plain | {i.alias: i.alias for i in imports(tree) if i.name is None and i.alias == i.package}


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """``np.memmap`` as ``numpy.memmap``; "" for what is no chain of names."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, known)}.{node.attr}"
    return ""


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name or attribute that is read, by its full name: what is not called now may be called later."""
    known = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield node.lineno, dotted(node, known)


def mapped(readme: str) -> Iterator[str]:
    """The paths in the map, whose indentation says in which folder; a line has one name or some, then what they are."""
    folders: list[str] = []
    for line in re.search(r"^```text\n(duoserve/\n.*?)^```", readme, re.DOTALL | re.MULTILINE)[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in takewhile(lambda word: word.endswith((".py", "/")), re.split("  +", line.strip())):
            if name.endswith("/"):
                folders[depth:] = [name]
            else:
                yield "".join([*folders[:depth], name])


def test_the_house_keeps_its_rules():
    assert violations(ROOT) == []


def test_the_table_lists_no_file_that_is_gone():
    assert [name for name in RANK if not (ROOT / "duoserve" / f"{name}.py").exists()] == []


def test_the_readmes_map_shows_every_file():
    shown = [path for path in mapped((ROOT / "README.md").read_text()) if not path.endswith("__init__.py")]
    assert sorted(shown) == sorted(f"duoserve/{name}.py" for name in RANK if not name.endswith("__init__"))


def test_no_file_is_longer_than_400_lines():
    files = [path for folder in ("duoserve", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert [str(path) for path in files if len(path.read_text().splitlines()) > MAX_LINES] == []


def test_the_reference_kernels_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import duoserve.kernels.reference"
    subprocess.run([sys.executable, "-c", code], check=True)


PLANTED = [
    (
        "experts/slots",
        "from duoserve.models.mixtral import parse_config",
        "imports models/mixtral, which does not stand",
    ),
    ("experts/slots", "from duoserve.models import mixtral", "imports models/mixtral, which does not stand"),
    ("experts/slots", "import duoserve.engine", "imports engine, which does not stand"),
    ("experts/store", "from duoserve.experts.slots import SlotPool", "imports experts/slots, which does not stand"),
    ("engine", "from duoserve import MoEModel", "imports __init__, which does not stand"),
    ("engine", "from duoserve import engine", "imports engine, which does not stand"),
    ("models/moe", "from duoserve.nowhere import x", "imports duoserve.nowhere.x, which does not stand"),
    ("kernels/new", "", "has no place in FLOORS"),
    ("engine", "def f():\n    from duoserve import errors", "otherwise than absolutely and at the top"),
    (
        "engine",
        "try:\n    import duoserve.errors\nexcept ImportError: pass",
        "otherwise than absolutely and at the top",
    ),
    (
        "kernels/__init__",
        "def f():\n    from duoserve.kernels import route_sort",
        "otherwise than absolutely and at the top",
    ),
    ("engine", "from .errors import DuoServeError", "otherwise than absolutely and at the top"),
    (
        "engine",
        "import importlib as il\nil.import_module('duoserve.cli')",
        "imports through importlib.import_module",
    ),
    ("engine", "m = __import__('duoserve')", "imports through __import__"),
    ("kernels/routed_rows", "import numpy", "a kernel imports numpy"),
    ("kernels/routed_rows", "def f():\n    import einops", "a kernel imports einops"),
    ("kernels/routed_rows", "from duoserve.config import Phase", "a kernel imports duoserve.config.Phase"),
    ("engine", "import pickle", "imports pickle, which runs code"),
    ("engine", "from torch import load", "imports torch.load, which runs code"),
    ("engine", "import torch as t\nt.load('x')", "uses torch.load, which runs code"),
    ("engine", "import torch.nn\ntorch.load('x')", "uses torch.load, which runs code"),
    ("engine", "import mmap", "imports mmap: model files are never mapped"),
    ("experts/rows", "import mmap\nmmap.mmap(fd, 9)", "maps a file"),
    ("engine", "from safetensors import safe_open", "imports safetensors.safe_open: model files"),
    ("engine", "import numpy as np\nread = np.memmap", "uses numpy.memmap: model files"),
]


@pytest.mark.parametrize(("name", "code", "message"), PLANTED)
def test_a_planted_violation_is_found(tmp_path, name, code, message):
    path = tmp_path / "duoserve" / f"{name}.py"
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = violations(tmp_path)
    assert any(message in fault for fault in found), found


INNOCENT = [
    ("experts/slots", "from duoserve.kernels import ExpertWeights\nfrom duoserve.experts import layout"),
    ("experts/rows", "import mmap\nmmap.mmap(-1, 4096)"),
    ("kernels/matmul", "import torch.nn.functional as F\nimport math\nfrom duoserve.errors import DuoServeError"),
    ("text/tokenizer", "from tokenizers import Tokenizer\nTokenizer.from_file('x')"),
    ("cli/app", "from duoserve.cli import generate, info\nimport json\njson.load(open('x'))"),
]


@pytest.mark.parametrize(("name", "code"), INNOCENT)
def test_the_innocent_are_let_go(tmp_path, name, code):
    path = tmp_path / "duoserve" / f"{name}.py"
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []
