"""transformers with accelerate's offloading: experts in host memory, moved to the device by a hook, layer by layer.

A layer's experts are one tensor each for gate_up and down, and accelerate moves all of it whatever was routed. So its
bytes do not depend on the routing, and random weights serve. All hooks are given the same pageable tensors, which is as
much to move as if every layer had its own.
"""

from __future__ import annotations

import importlib.util
import time
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from serve.host import Host
from serve.models import Unavailable
from serve.replay import random_weights

SECONDS = 20.0  # after which no further token is begun
BLOCK_ELEMENTS = 1 << 20
CPU = torch.device("cpu")

Made = dict[str, Any]


def accelerate_offload(raw: dict[str, Any], host: Host, prompt: int, steps: int) -> Made:
    """TTFT, the gaps between tokens, and the peak of device memory, after a token that warms up."""
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"not installed: {' and '.join(missing)}")
    held = host.reset_peak()
    model, moved_bytes = offloaded(raw, host.device)
    _seconds(model, prompt, 0, host.device)
    ttft_s, *itl_s = _seconds(model, prompt, steps, host.device)
    peak = host.peak_bytes()
    peak = None if peak is None else peak - held
    return {"ttft_s": ttft_s, "itl_s": itl_s, "peak_bytes": peak, "moved_bytes": moved_bytes, "prompt": prompt}


def offloaded(raw: dict[str, Any], device: torch.device) -> tuple[nn.Module, int]:
    """The model with random weights, its experts behind hooks; and the bytes that the hooks move in a pass."""
    from accelerate import init_empty_weights  # noqa: PLC0415 (peers are optional)
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=torch.bfloat16).eval()
    shared: dict[torch.Size, Tensor] = {}
    moved_bytes = 0
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if name.endswith(".experts"):
            for parameter in own.values():
                if parameter.shape not in shared:
                    shared[parameter.shape] = _random(parameter.shape, CPU)
            weights = {key: shared[parameter.shape] for key, parameter in own.items()}
            moved_bytes += sum(weight.nbytes for weight in weights.values())
            add_hook_to_module(module, AlignDevicesHook(device, offload=True, weights_map=weights))
        else:
            for key, parameter in own.items():
                setattr(module, key, nn.Parameter(_random(parameter.shape, device), requires_grad=False))
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(device))
    return model, moved_bytes


def _random(shape: torch.Size, device: torch.device) -> Tensor:
    """Small bfloat16 numbers, a block of them over and over: quickly made, and no product overflows."""
    flat = torch.empty(prod(shape), dtype=torch.bfloat16, device=device)
    block = _block(device)
    for start in range(0, len(flat), BLOCK_ELEMENTS):
        part = flat[start : start + BLOCK_ELEMENTS]
        part.copy_(block[: len(part)])
    return flat.view(shape)


@cache
def _block(device: torch.device) -> Tensor:
    return random_weights(2 * BLOCK_ELEMENTS).view(torch.bfloat16).to(device)


@torch.inference_mode()
def _seconds(model: nn.Module, prompt: int, steps: int, device: torch.device) -> list[float]:
    """Of the first token and of each after it."""
    fresh = torch.arange(3, prompt + 3, device=device)[None] % 300
    cache, times = None, []
    while len(times) <= steps and sum(times) < SECONDS:
        began = time.perf_counter()
        out = model(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=1)
        fresh, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        fresh.tolist()  # waits for the device
        times.append(time.perf_counter() - began)
    return times
