"""The inputs of a decode step: written on the host, packed, and brought by one copy to where they always lie.

On the host and on the device a batch is one run of int32 words: the columns, each from a multiple of 16 bytes on (which
kernels are compiled for), then the block table, as wide as the step's longest sequence needs it. A second copy, on the
device, spreads the table to rows of its full width. Sequences get a page once in many steps, so rows of the table that
are as they were are not written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace_core.batch.step import Chunk
from headrace_core.model.host_copies import copy_to_device

_ROWS_ALIGNED = 4
"""As many int32 are 16 bytes."""


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One token each of B sequences.

    `token_ids`, `positions`, `slot_mapping` [B] int64, slot -1: write nothing; `block_table` [B, max_pages] int32;
    `context_lens` [B] int32, the token itself included.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    context_lens: Tensor

    def first(self, num_rows: int) -> DecodeBatch:
        """Return views of the first rows."""
        return DecodeBatch(
            self.token_ids[:num_rows],
            self.positions[:num_rows],
            self.slot_mapping[:num_rows],
            self.block_table[:num_rows],
            self.context_lens[:num_rows],
        )


class DecodeBatchBuffers:
    """A batch of up to `num_rows` sequences of up to `max_pages` pages. Engine thread only, but to construct it.

    `device` stays where it is; at first it is token 0 at position 0 in page 0 in every row, writing nothing.
    """

    def __init__(self, *, num_rows: int, max_pages: int, page_size: int, device: str) -> None:
        self._page_size = page_size
        self._column = -(-num_rows // _ROWS_ALIGNED) * _ROWS_ALIGNED
        self._host_words = np.zeros(7 * self._column + num_rows * max_pages, dtype=np.int32)
        self._token_ids, self._positions, self._slots = (
            self._host_words[: 6 * self._column].view(np.int64).reshape(3, self._column)
        )
        self._context_lens = self._host_words[6 * self._column : 7 * self._column]
        self._slots.fill(-1)
        self._context_lens.fill(1)
        self._tables = np.zeros((num_rows, max_pages), dtype=np.int32)
        self._page_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self._device_words = torch.from_numpy(self._host_words).to(device, copy=True)
        columns = self._device_words[: 6 * self._column].view(torch.int64).view(3, self._column)
        self.device = DecodeBatch(
            *columns,
            block_table=torch.zeros(num_rows, max_pages, dtype=torch.int32, device=device),
            context_lens=self._device_words[6 * self._column : 7 * self._column],
        ).first(num_rows)

    def load(self, chunks: Sequence[Chunk], num_rows: int) -> None:
        """Make the first `num_rows` rows of `device` the chunks' tokens, then copies of row 0 that write nothing.

        Raises:
            ValueError: a chunk's pages do not cover it, or are more than fit.
        """
        used = [chunk.start // self._page_size + 1 for chunk in chunks]
        self._check(chunks, used)
        self._write_columns(chunks, used, num_rows)
        first, width = 7 * self._column, max(used)
        end = first + num_rows * width
        self._write_tables(chunks, used, self._host_words[first:end].reshape(num_rows, width))
        copy_to_device(torch.from_numpy(self._host_words[:end]), self._device_words[:end])
        table = self._device_words[first:end].view(num_rows, width)
        self.device.block_table[:num_rows, :width].copy_(table)

    def _check(self, chunks: Sequence[Chunk], used: Sequence[int]) -> None:
        most = self._tables.shape[1]
        for chunk, pages in zip(chunks, used, strict=True):
            if pages > min(len(chunk.page_ids), most):
                raise ValueError(
                    f"chunk {chunk.key}: token {chunk.start} does not fit {len(chunk.page_ids)} pages of "
                    f"{self._page_size} ({most} at most)"
                )

    def _write_columns(self, chunks: Sequence[Chunk], used: Sequence[int], num_rows: int) -> None:
        count, size = len(chunks), self._page_size
        self._token_ids[:count] = [chunk.token_ids[0] for chunk in chunks]
        self._positions[:count] = [chunk.start for chunk in chunks]
        self._slots[:count] = [c.page_ids[p - 1] * size + c.start % size for c, p in zip(chunks, used, strict=True)]
        self._context_lens[:count] = self._positions[:count] + 1
        for column in (self._token_ids, self._positions, self._context_lens):
            column[count:num_rows] = column[0]
        self._slots[count:num_rows] = -1

    def _write_tables(self, chunks: Sequence[Chunk], used: Sequence[int], packed: np.ndarray) -> None:
        """Write the pages of each row to `packed` [rows, width]; past them is what earlier steps left, ids of pages."""
        for row, (chunk, pages) in enumerate(zip(chunks, used, strict=True)):
            page_ids = chunk.page_ids[:pages]
            if page_ids != self._page_ids[row]:
                self._tables[row, :pages] = page_ids
                self._page_ids[row] = page_ids
        packed[: len(chunks)] = self._tables[: len(chunks), : packed.shape[1]]
        packed[len(chunks) :] = packed[0]
