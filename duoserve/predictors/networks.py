"""Trains the networks of two predictors with torch on a CPU; the results are NumPy arrays.

N tokens, E experts, F direct features, X inputs, H hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duoserve.predictors.learned import DIRECT


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. It ends after ``patience`` epochs without a better held-out loss.

    ``epoch_rows`` bounds the examples of an epoch, which are drawn anew each time, and the held-out examples, which are
    the same after each epoch. ``positive_weight`` is the weight of a chosen expert in the loss, None for 1.
    """

    width: int
    epochs: int
    patience: int
    learning_rate: float
    weight_decay: float
    batch: int
    epoch_rows: int
    positive_weight: float | None = None


FLOAT = torch.float32  # the dtype of examples, whatever the calling program makes torch's default
Data = tuple[np.ndarray, np.ndarray]
Module = TypeVar("Module", bound=nn.Module)


class LayerModule(nn.Module):
    """LayerNetwork in torch. It begins with outer weights of zero, so that only the direct features count."""

    def __init__(self, num_inputs: int, num_experts: int, width: int, direct_F: Tensor, bias_E: Tensor) -> None:
        super().__init__()
        self.direct = nn.Parameter(direct_F[:, None].repeat(1, num_experts))
        self.bias = nn.Parameter(bias_E.clone())
        self.inner = nn.Linear(num_inputs, width, dtype=FLOAT)
        self.outer = nn.Parameter(torch.zeros(width, num_experts, dtype=FLOAT))

    def forward(self, x_NX: Tensor) -> Tensor:
        direct_NFE = x_NX[:, : self.direct.numel()].view(-1, *self.direct.shape)
        logits_NE: Tensor = (direct_NFE * self.direct).sum(1) + self.bias + F.relu(self.inner(x_NX)) @ self.outer
        return logits_NE


def fit_layer(train: Data, held_out: Data, recipe: Recipe, looks_ahead: bool) -> dict[str, np.ndarray]:
    """The trained arrays of a LayerNetwork, by their names there.

    ``looks_ahead``: the first feature is the margin for the layer itself. Otherwise it is that for another layer, which
    only the inner layers may use.
    """
    drawn = torch.randperm(len(train[0]))[: recipe.epoch_rows // 4].numpy()
    start = fit_start(train[0][drawn], train[1][drawn], looks_ahead)
    module = fit(LayerModule(train[0].shape[1], train[1].shape[1], recipe.width, *start), train, held_out, recipe)
    arrays: dict[str, Tensor] = {"direct_FE": module.direct, "bias_E": module.bias, "outer_HE": module.outer}
    arrays |= {"inner_XH": module.inner.weight.T, "inner_bias_H": module.inner.bias}
    return {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in arrays.items()}


def fit_start(x: np.ndarray, y: np.ndarray, looks_ahead: bool) -> tuple[Tensor, Tensor]:
    """The best weights [F] of the direct features for all experts alike, and biases [E]: a logistic regression."""
    x_NFE, y_NE = torch.from_numpy(x[:, : DIRECT * y.shape[1]]).view(len(x), DIRECT, -1), torch.from_numpy(y)
    used_F1 = torch.ones(DIRECT, 1, dtype=FLOAT)
    used_F1[0] = float(looks_ahead)
    direct_F1 = torch.full((DIRECT, 1), 0.3, dtype=FLOAT, requires_grad=True)
    bias_E = torch.zeros(y.shape[1], dtype=FLOAT, requires_grad=True)
    optimizer = torch.optim.LBFGS([direct_F1, bias_E], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits_NE = (x_NFE * (direct_F1 * used_F1)).sum(1) + bias_E
        loss = F.binary_cross_entropy_with_logits(logits_NE, y_NE)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (direct_F1 * used_F1).detach()[:, 0], bias_E.detach()


def fit_perceptron(train: Data, held_out: Data, recipe: Recipe, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights [in, out] and biases of a perceptron with ``depth`` linear layers of ``recipe.width`` units."""
    widths = [train[0].shape[1], *[recipe.width] * (depth - 1), train[1].shape[1]]
    parts: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        parts += [nn.Linear(inner, outer, dtype=FLOAT), nn.ReLU()]
    module = fit(nn.Sequential(*parts[:-1]), train, held_out, recipe)
    linears = [part for part in module if isinstance(part, nn.Linear)]
    return [(np.ascontiguousarray(p.weight.detach().numpy().T), p.bias.detach().numpy()) for p in linears]


def fit(module: Module, train: Data, held_out: Data, recipe: Recipe) -> Module:
    """Trains by Adam with cosine decay on the binary cross-entropy of each expert; gives the best held-out state."""
    x_NX, y_NE = (torch.from_numpy(array) for array in train)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    loss_of, held_out_rows = _loss(recipe), torch.randperm(len(held_out[0]))[: recipe.epoch_rows].numpy()
    held_out = held_out[0][held_out_rows], held_out[1][held_out_rows]
    best, best_state, since = held_out_loss(module, held_out, loss_of), copy.deepcopy(module.state_dict()), 0
    for _ in range(recipe.epochs):
        module.train()
        drawn = torch.randperm(len(x_NX))[: recipe.epoch_rows]
        for start in range(0, len(drawn), recipe.batch):
            rows = drawn[start : start + recipe.batch]
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(module(x_NX[rows]), y_NE[rows]))
            optimizer.step()
        schedule.step()
        loss, since = held_out_loss(module, held_out, loss_of), since + 1
        if loss < best:
            best, best_state, since = loss, copy.deepcopy(module.state_dict()), 0
        if since >= recipe.patience:
            break
    module.load_state_dict(best_state)
    return module.eval()


@torch.no_grad()
def held_out_loss(module: nn.Module, held_out: Data, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean loss on held-out examples."""
    module.eval()
    x_NX, y_NE = (torch.from_numpy(array) for array in held_out)
    return float(loss_of(module(x_NX), y_NE))


def _loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    weight = None if recipe.positive_weight is None else torch.tensor(recipe.positive_weight, dtype=FLOAT)

    def loss(logits_NE: Tensor, y_NE: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits_NE, y_NE, pos_weight=weight)

    return loss
