"""Muon (Jordan et al., 2024): momentum made orthogonal, for matrices and for stacks of matrices. B, M, N: any."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def orthogonalize(x_BMN: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, by the Newton-Schulz quintic of Muon (Jordan et al., 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = x_BMN.shape[-2] > x_BMN.shape[-1]
    x = x_BMN.mT if flip else x_BMN
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for matrices and stacks of matrices (one per expert); decoupled weight decay."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[-2] / p.shape[-1])))
