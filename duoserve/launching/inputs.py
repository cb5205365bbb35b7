"""The inputs of a recorded decode step from the host: its tokens, and which experts to compute from which slots.

B sequences, M pages of the page table, E experts, W = E entries of a work list.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch

from duoserve.kernels import DeviceWork
from duoserve.kernels.recorder import Recorder
from duoserve.kv_cache import BatchKV, NewTokens, PagedKVCache
from duoserve.models.batch import Batch


class DecodeInputs:
    """The tokens of a recorded step of B sequences whose page table is M wide.

    Before the first ``load`` all rows are padding, which is stored nowhere.
    """

    def __init__(self, recorder: Recorder, cache: PagedKVCache, num_sequences: int, table_width: int) -> None:
        self._recorder = recorder
        self._cache = cache
        self.shape = (num_sequences, table_width)
        # Token ids, positions, cache rows and lengths, then the page table: one copy brings them all.
        self._sizes = [*[num_sequences] * 4, num_sequences * table_width]
        self._host_N = recorder.host((sum(self._sizes),), torch.int64)
        self._host_N[2 * num_sequences : 3 * num_sequences] = -1  # a negative row is not written
        self._device_N = self._host_N.to(recorder.device, copy=True)
        self._table_BM = torch.zeros(self.shape, dtype=torch.int32, device=recorder.device)
        self._lengths_B = torch.zeros(num_sequences, dtype=torch.int32, device=recorder.device)

    def load(self, new_tokens: NewTokens) -> None:
        """Writes ``new_tokens`` for the next replay; the one before must have ended.

        If these have fewer than B sequences, the others are padding: a token that is stored nowhere and attends to
        nothing.
        """
        padding = self.shape[0] - len(new_tokens.spans)
        none, nowhere = [0] * padding, [-1] * padding
        numbers = (
            new_tokens.token_ids,
            none,
            new_tokens.positions,
            none,
            new_tokens.rows,
            nowhere,
            new_tokens.lengths,
            none,
        )
        host_N = self._host_N.numpy()
        host_N[: sum(self._sizes[:4])] = list(chain.from_iterable(numbers))
        table_BM = host_N[sum(self._sizes[:4]) :].reshape(self.shape)
        for pages_M, pages in zip(table_BM, new_tokens.page_table, strict=False):  # entries behind pages are not read
            pages_M[: len(pages)] = pages[: self.shape[1]]  # a sequence may have more pages than it uses yet

    def batch(self, num_pages: int | None = None) -> Batch:
        """Records the copy of the tokens to the device and gives their batch; ``num_pages`` as in ``kv``."""
        self._recorder.copy(self._device_N, self._host_N)
        token_ids_B, positions_B, _, lengths_B, table = torch.split_with_sizes(self._device_N, self._sizes)
        self._table_BM.copy_(table.view(self.shape))
        self._lengths_B.copy_(lengths_B)
        return Batch(token_ids_B, positions_B, tuple((b, b + 1) for b in range(self.shape[0])), self.kv(num_pages))

    def kv(self, num_pages: int | None = None) -> BatchKV:
        """The KV store of the batch; contexts have up to ``num_pages`` pages (None: M)."""
        _, _, rows_B, _, _ = torch.split_with_sizes(self._device_N, self._sizes)
        return BatchKV(self._cache, rows_B, self._table_BM[:, :num_pages], self._lengths_B)


class WorkFeed:
    """A list on the device of experts to compute, which the host sends anew, one list after the other.

    Up to ``num_lists`` lists may be on their way before ``rewind``.
    """

    def __init__(self, recorder: Recorder, num_experts: int, num_lists: int) -> None:
        self._recorder = recorder
        self._num_experts = num_experts
        host_LW = recorder.host((num_lists, 2 * num_experts + 1), torch.int32)
        self._lists = [(host_W, host_W.numpy()) for host_W in host_LW]
        self._device_W = torch.zeros(2 * num_experts + 1, dtype=torch.int32, device=recorder.device)
        self._next = 0
        self.work = DeviceWork(*torch.split_with_sizes(self._device_W, [num_experts, num_experts, 1]))

    def rewind(self) -> None:
        """To be called when all lists have arrived: their memory on the host is then used again."""
        self._next = 0

    def load(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Enqueues the copy of a list of (expert, slot) pairs into ``work``."""
        (host_W, entries), ascending = self._lists[self._next], sorted(pairs)
        num = len(ascending)
        entries[:num] = [expert for expert, _ in ascending]
        entries[self._num_experts : self._num_experts + num] = [slot for _, slot in ascending]
        entries[-1] = num
        self._recorder.copy(self._device_W, host_W)
        self._next += 1
