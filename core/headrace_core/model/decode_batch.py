"""The inputs of a decode step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
