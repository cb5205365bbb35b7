"""What must be settled before anything imports torch or triton, and what holds for tests of every folder.

Processes that test side by side share the cores, and without a GPU the Triton kernels run in Triton's interpreter.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, so that no change is judged by chance; a developer who looks for others says
# --hypothesis-profile=explore. On a busy machine an example may take any time. On a GPU, which one has for minutes, an
# example that fails is not made smaller: each shape would compile kernels of its own.
if find_spec("hypothesis"):  # kernels can be tested where it is missing, as far as they do without
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("same", settings.get_profile("explore"), derandomize=True)
    as_found = (Phase.explicit, Phase.generate)
    settings.register_profile("gpu", settings.get_profile("same"), phases=as_found, print_blob=True)
    settings.load_profile("gpu" if torch.cuda.is_available() else "same")

# They take minutes each: were one begun last, it would keep one worker at it and the others waiting. What the first
# three have compiled is on the disk for those that come later.
LONGEST = ("test_compiled.py", "test_bench.py", "test_compiled_batches.py", "test_machine_code.py")


def pytest_configure(config: pytest.Config) -> None:
    """Files go to workers in the order that they have here, not by how many tests they have."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def automatic_device_is_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a machine with a GPU too, for tests that do not say where a model runs; but not where devices are chosen."""
    with pytest.MonkeyPatch.context() as patch:
        if not _of_kernels(request) and request.path.name != "test_device.py":
            patch.setattr("duoserve.experts.device._automatic", lambda: "cpu")
        yield


@pytest.fixture(autouse=True)
def processes_without_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do the processes that a test starts, but for those of a test that is marked ``gpu``."""
    if not _of_kernels(request) and request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _of_kernels(request: pytest.FixtureRequest) -> bool:
    """Their tests run on the GPU, where there is one, and may be all that can be imported."""
    return "kernels" in request.path.parts
