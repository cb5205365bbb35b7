"""Brings the routers' choices in a recorded step to the host, for the scheduler and for listeners.

N layers that have experts, B sequences, K top-k, E experts, M look-ahead scores over all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duoserve.kernels.recorder import Recorder
from duoserve.models.moe import MoEBlock, Routed


class RecordedChoices:
    """The choices of ``blocks`` (in the order of their layers) in the last replay; undefined before the first."""

    def __init__(self, recorder: Recorder, blocks: Sequence[MoEBlock], num_sequences: int) -> None:
        self._recorder = recorder
        self._blocks = blocks
        self._heard = blocks[0].tap is not None
        self._later = [[] if block.tap is None else block.tap.later(block.layer) for block in blocks]
        shape, num_scores = (len(blocks), num_sequences, blocks[0].top_k), sum(map(len, self._later))
        self.ids_NBK = recorder.host(shape, torch.int64)
        self._weights_NBK = recorder.host(shape, torch.float32)
        scores_shape = (num_scores, num_sequences, blocks[0].num_experts)
        self._scores_MBE = (
            recorder.host(scores_shape, torch.float32)
            if num_scores
            else torch.empty(scores_shape, dtype=torch.float32, device="cpu")
        )

    def bring(self, chosen: Sequence[Routed]) -> None:
        """Records the copies of the choices to the host, and of the weights and scores that listeners want."""
        self._recorder.copy(self.ids_NBK, _stacked([routed.topk_ids_TK for routed in chosen]))
        if not self._heard:
            return
        self._recorder.copy(self._weights_NBK, _stacked([routed.topk_weights_TK for routed in chosen]))
        scores = [one for block, routed in zip(self._blocks, chosen, strict=True) for one in _look_ahead(block, routed)]
        if scores:
            self._recorder.copy(self._scores_MBE, _stacked(scores))

    def report(self, num_sequences: int | None = None) -> bool:
        """Tells the taps of the blocks what was chosen in a replay; gives False if there are no listeners.

        The taps are told of the first ``num_sequences`` sequences (None: of all); any others are padding.
        """
        if not self._heard:
            return False
        scores = iter(self._scores_MBE.numpy()[:, :num_sequences])
        for block, ids_BK, weights_BK, later in zip(
            self._blocks,
            self.ids_NBK.numpy()[:, :num_sequences],
            self._weights_NBK.numpy()[:, :num_sequences],
            self._later,
            strict=True,
        ):
            if block.tap is not None:  # gets copies to keep: the next step overwrites this memory
                ahead = {layer: next(scores).copy() for layer in later}
                block.tap.routed_on_host(block.layer, ids_BK.copy(), weights_BK.copy(), ahead)
        return True


def _look_ahead(block: MoEBlock, routed: Routed) -> list[Tensor]:
    return [] if block.tap is None else list(block.tap.look_ahead(block.layer, routed.x_TH).values())


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors stacked along a new first axis; a single tensor takes no kernel launch."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
