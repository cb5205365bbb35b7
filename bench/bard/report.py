"""How good an embedded model is on texts it has not seen, and how it routes them.

Shapes: T tokens, L layers, E experts, K top-k.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bard.configs import CONTEXT
from shakespeare import token_ids


@torch.no_grad()
def score(model: PreTrainedModel, ids: list[int]) -> tuple[float, Tensor]:
    """Nats of one text, every token scored with at least half a context before it, and its routing [L, T, K]."""
    model.eval()
    nats, stride, routed, top_k = 0.0, CONTEXT // 2, [], model.config.num_experts_per_tok
    for start in tqdm(range(0, len(ids) - 1, stride), desc="score", mininterval=10, leave=False):
        begin = max(0, start - stride)
        window = torch.tensor(ids[begin : start + stride + 1])
        out = model(window[None, :-1], output_router_logits=True)
        scored = len(window) - 1 - (start - begin)
        nats += F.cross_entropy(out.logits[0, -scored:].float(), window[-scored:], reduction="sum").item()
        routed.append(torch.stack([logits_TE[-scored:].topk(top_k).indices for logits_TE in out.router_logits]))
    return nats, torch.cat(routed, dim=1)


def mark(routed_LTK: Tensor, num_experts: int) -> Tensor:
    """Whether an expert was chosen: bool [L, T, E]."""
    return torch.zeros(*routed_LTK.shape[:2], num_experts, dtype=torch.bool).scatter_(2, routed_LTK, True)


def distinct_experts(chosen_LTE: Tensor, window: int) -> float:
    """D(W): mean number of distinct experts that a layer uses within ``window`` consecutive tokens."""
    whole = chosen_LTE.shape[1] // window
    windows = chosen_LTE[:, : whole * window].unflatten(1, (whole, window))
    return windows.any(2).sum(-1).float().mean().item()


def evaluate(model: PreTrainedModel, tokenizer: Tokenizer, texts: dict[str, str]) -> dict[str, Any]:
    """Bits per byte of each text, and how the model routes them."""
    bits, routed = {}, []
    for name, text in texts.items():
        nats, routed_LTK = score(model, token_ids(tokenizer, text))
        bits[name] = round(nats / math.log(2) / len(text.encode()), 4)
        routed.append(routed_LTK)
    chosen_LTE = mark(torch.cat(routed, dim=1), model.config.num_experts)
    shares_LE = chosen_LTE.float().mean(1)
    return {
        "bits_per_byte": bits,
        "distinct_experts": {w: round(distinct_experts(chosen_LTE, w), 2) for w in (2, 4, 8, 16, 32)},
        "least_used_expert_share": round(shares_LE.min().item(), 4),
        "most_used_expert_share": round(shares_LE.max().item(), 4),
        "expert_share": [[round(share, 4) for share in row] for row in shares_LE.tolist()],
    }
