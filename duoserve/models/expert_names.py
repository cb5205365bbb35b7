"""The ways in which families store their routed experts in a checkpoint.

E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

from duoserve.config import ModelConfig
from duoserve.experts.layout import ExpertId
from duoserve.experts.pieces import ExpertPieces, MatrixPiece


def separate(
    config: ModelConfig,
    expert: ExpertId,
    block: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> ExpertPieces:
    """Three tensors an expert, with these ``names``: gate and up [I, H], and down [H, I]."""
    prefix = f"model.layers.{expert.layer}.{block}.experts.{expert.expert}"
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    wide = (config.expert_intermediate_size, config.hidden_size)
    return (MatrixPiece("gate", gate, wide), MatrixPiece("up", up, wide), MatrixPiece("down", down, wide[::-1]))


def fused(config: ModelConfig, expert: ExpertId) -> ExpertPieces:
    """Two tensors a layer: ``input_linear`` [E, 2I, H] with gate rows before up rows, ``output_linear`` [E, H, I]."""
    prefix = f"model.layers.{expert.layer}.block_sparse_moe"
    experts, hidden, inter = config.num_experts, config.hidden_size, config.expert_intermediate_size
    up_name, up_shape = f"{prefix}.input_linear.weight", (experts, 2 * inter, hidden)
    return (
        MatrixPiece("gate", up_name, up_shape, expert.expert, rows=(0, inter)),
        MatrixPiece("up", up_name, up_shape, expert.expert, rows=(inter, 2 * inter)),
        MatrixPiece("down", f"{prefix}.output_linear.weight", (experts, hidden, inter), expert.expert),
    )


def transposed(config: ModelConfig, expert: ExpertId) -> ExpertPieces:
    """Two tensors a layer: ``gate_up_proj`` [E, H, 2I] with gate and up in turn, ``down_proj`` [E, I, H]."""
    prefix = f"model.layers.{expert.layer}.mlp.experts"
    experts, hidden, inter = config.num_experts, config.hidden_size, config.expert_intermediate_size
    up_shape, down_shape = (experts, hidden, 2 * inter), (experts, inter, hidden)
    return (
        MatrixPiece("gate_up", f"{prefix}.gate_up_proj", up_shape, expert.expert, transposed=True),
        MatrixPiece("down", f"{prefix}.down_proj", down_shape, expert.expert, transposed=True),
    )
