"""Which device a name means, on machines with none and with several."""

from __future__ import annotations

import pytest
import torch

from duoserve.errors import ConfigError
from duoserve.experts.device import free_bytes, resolve_device


def machine(
    monkeypatch: pytest.MonkeyPatch, found: int, current: int = 0, capability: tuple[int, int] = (8, 0)
) -> None:
    """So many GPUs of one kind, of which one is torch's current device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_the_first_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, found=2)
    assert resolve_device(name) == torch.device("cuda", 0)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("name", "current", "meant"), [("cuda:2", 0, 2), ("cuda", 1, 1), ("cuda:0", 1, 0)])
def test_another_gpu_than_the_first_is_refused(
    name: str, current: int, meant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current device is each thread's own, and the first one in a new thread."""
    machine(monkeypatch, found=3, current=current)
    with pytest.raises(
        ConfigError, match=f"{name!r} means cuda:{meant}, and cuda:{current} is .* CUDA_VISIBLE_DEVICES"
    ):
        resolve_device(name)


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, found=2)
    with pytest.raises(ConfigError, match="'cuda:2' was asked for, but torch finds 2 CUDA devices"):
        resolve_device("cuda:2")
    machine(monkeypatch, found=0)
    assert resolve_device("auto") == torch.device("cpu")
    for name, message in {"cuda": "torch finds 0", "mps": "is not supported", "gpu": "is no device"}.items():
        with pytest.raises(ConfigError, match=message):
            resolve_device(name)


def test_a_gpu_that_kernels_do_not_run_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, found=1, capability=(7, 5))
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=rf"{name!r} .* capability 7\.5, but .* need 8\.0 .* device='cpu'"):
            resolve_device(name)
    with pytest.warns(UserWarning, match=r"'auto' is the CPU: cuda:0 has compute capability 7\.5"):
        assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_gpus_than_the_oldest_are_taken(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, found=1, capability=capability)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)


def test_what_a_closed_model_has_left_to_the_allocator_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in {"mem_get_info": (100, 1000), "memory_reserved": 600, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_bytes(torch.device("cuda", 0)) == 100 + 550
