"""The router: which experts a token goes to, and with which weights.

T tokens, K top-k, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.architecture import RouterConfig
from duoserve.kernels import Products
from duoserve.models.layers import Linear
from duoserve.models.tensors import Tensors


@dataclass(frozen=True)
class Router:
    """A router: ``logits``, then ``choose``; ``correction_E`` shifts the scores of the choice, but not the weights."""

    config: RouterConfig
    projection: Linear
    correction_E: Tensor | None = None

    @classmethod
    def load(cls, config: RouterConfig, hidden: int, tensors: Tensors) -> Router:
        """Loads the router from ``weight``, and the bias and correction that the config names."""
        dtype = torch.float32 if config.wide else None
        weight_EH = tensors("weight", config.num_experts, hidden, dtype=dtype)
        projection = Linear(weight_EH, tensors("bias", config.num_experts, dtype=dtype) if config.bias else None)
        if not config.correction:
            return cls(config, projection)
        return cls(config, projection, tensors("e_score_correction_bias", config.num_experts, dtype=torch.float32))

    def logits(self, x_TH: Tensor) -> Tensor:
        """Logits [T, E], in float32 if the config says ``wide``."""
        return self.projection(x_TH.float() if self.config.wide else x_TH)

    def choose(self, logits_TE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Float32 weights [T, K] and int64 ids [T, K], the best first; ``dtype`` is that of the activations."""
        if self.projection.products is Products.FASTEST:
            return self._choose(logits_TE, dtype)
        rows = [self._choose(logits_TE[t : t + 1], dtype) for t in range(len(logits_TE))]
        return torch.cat([weights_1K for weights_1K, _ in rows]), torch.cat([ids_1K for _, ids_1K in rows])

    def _choose(self, logits_TE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return kernels.router_topk(
            logits_TE,
            self.config.top_k,
            scoring=self.config.scoring,
            bias_E=self.correction_E,
            n_group=self.config.n_group,
            topk_group=self.config.topk_group,
            renormalize=self.config.renormalize,
            scale=self.config.scale,
            round_to=dtype if self.config.rounded else torch.float32,
        )
