"""Lay a step's chunks out as the flat tensors that attention works on, once for all layers.

Tokens are put into two runs: first those computed as single queries over their whole context (decode rows; absorbed,
for latent attention), then the prompt chunks. Groups of chunks bound the memory that expanded keys and values take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from headrace_kernels.dispatch import backend_of
from headrace_kernels.paged_slots import paged_slots
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from headrace_core.batch.step import Chunk
from headrace_core.model.host_copies import to_device

GROUP_KEY_TOKENS = 8192
"""Contexts of several chunks are expanded together up to so many tokens; one longer than that, alone."""
# A network decodes with one of these; which one is not known here.
_DECODE_FAMILIES = ("mla_decode", "gqa_decode")


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Tokens 0 ... B of the step, each a query over the first `context_lens` [B] tokens of its pages.

    `slots` are planned for kernels that gather, plain torch's; others read pages where they lie, and have none. `plan`
    says how the contexts are shared out, where they are (`Attention.plan_decode`).
    """

    block_table: Tensor
    context_lens: Tensor
    slots: Tensor | None = None
    plan: SplitPlan | None = None

    @property
    def num_rows(self) -> int:
        """B."""
        return self.block_table.shape[0]


@dataclass(frozen=True, slots=True)
class PrefillGroup:
    """Chunks whose tokens are `first` ... `end` of the step; their contexts lie at `slots` [S], one after another."""

    first: int
    end: int
    slots: Tensor
    query_starts: Tensor
    key_starts: Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, flat.

    `token_ids`, `positions`, `slot_mapping`: [T] int64. `chunk_rows`: for each chunk the place of its first token.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    decode: DecodeRows | None
    prefill: list[PrefillGroup]
    chunk_rows: list[int]


def prepare_step(
    chunks: Sequence[Chunk], page_size: int, *, max_decode_chunk: int | None, device: str = "cpu", first_page: int = 0
) -> StepInputs:
    """Return the step's inputs, for a cache whose first page is number `first_page` (`KvCache`).

    A chunk with a cached prefix and at most `max_decode_chunk` tokens becomes decode rows; None: every chunk does.

    Raises:
        ValueError: a chunk is empty or its pages do not cover it.
    """
    decode = [i for i, chunk in enumerate(chunks) if _is_decoded(chunk, max_decode_chunk)]
    is_decode = set(decode)
    prefill = [i for i in range(len(chunks)) if i not in is_decode]
    chunk_rows = [0] * len(chunks)
    token_ids: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    for i in decode + prefill:
        chunk = chunks[i]
        _check(chunk, page_size)
        chunk_rows[i] = len(token_ids)
        token_ids += chunk.token_ids
        position = np.arange(chunk.start, chunk.start + len(chunk.token_ids))
        positions.append(position)
        slots.append(_rows(chunk, first_page)[position // page_size] * page_size + position % page_size)
    first = sum(len(chunks[i].token_ids) for i in decode)
    return StepInputs(
        token_ids=to_device(torch.tensor(token_ids), device),
        positions=to_device(torch.from_numpy(np.concatenate(positions)), device),
        slot_mapping=to_device(torch.from_numpy(np.concatenate(slots)), device),
        decode=_decode_rows([chunks[i] for i in decode], page_size, device, first_page) if decode else None,
        prefill=_prefill_groups([chunks[i] for i in prefill], page_size, first, device, first_page),
        chunk_rows=chunk_rows,
    )


def _is_decoded(chunk: Chunk, max_decode_chunk: int | None) -> bool:
    return max_decode_chunk is None or (chunk.start > 0 and len(chunk.token_ids) <= max_decode_chunk)


def _check(chunk: Chunk, page_size: int) -> None:
    end = chunk.start + len(chunk.token_ids)
    if not chunk.token_ids or chunk.start < 0 or end > len(chunk.page_ids) * page_size:
        raise ValueError(
            f"chunk {chunk.key}: {len(chunk.token_ids)} tokens from {chunk.start} do not fit "
            f"{len(chunk.page_ids)} pages of {page_size}"
        )


def _rows(chunk: Chunk, first_page: int) -> np.ndarray:
    """Return where in the cache's tensors the chunk's pages are."""
    return np.asarray(chunk.page_ids) - first_page


def _decode_rows(chunks: list[Chunk], page_size: int, device: str, first_page: int) -> DecodeRows:
    tables: list[np.ndarray] = []
    context_lens: list[int] = []
    for chunk in chunks:
        table = _rows(chunk, first_page)
        for offset in range(1, len(chunk.token_ids) + 1):
            context_lens.append(chunk.start + offset)
            tables.append(table)
    num_pages = -(-max(context_lens) // page_size)
    block_table = np.zeros((len(tables), num_pages), dtype=np.int32)
    for row, table in zip(block_table, tables, strict=True):
        row[: len(table)] = table[:num_pages]
    table_tensor = to_device(torch.from_numpy(block_table), device)
    lens_tensor = to_device(torch.tensor(context_lens, dtype=torch.int32), device)
    is_gathered = any(backend_of(family, table_tensor) == "reference" for family in _DECODE_FAMILIES)
    slots = paged_slots(table_tensor, lens_tensor, page_size) if is_gathered else None
    return DecodeRows(table_tensor, lens_tensor, slots)


def _prefill_groups(
    chunks: list[Chunk], page_size: int, first: int, device: str, first_page: int
) -> list[PrefillGroup]:
    groups: list[PrefillGroup] = []
    members: list[Chunk] = []
    for chunk in chunks:
        held = sum(member.start + len(member.token_ids) for member in members)
        if members and held + chunk.start + len(chunk.token_ids) > GROUP_KEY_TOKENS:
            groups.append(_prefill_group(members, page_size, first, device, first_page))
            first, members = groups[-1].end, []
        members.append(chunk)
    if members:
        groups.append(_prefill_group(members, page_size, first, device, first_page))
    return groups


def _prefill_group(chunks: list[Chunk], page_size: int, first: int, device: str, first_page: int) -> PrefillGroup:
    queries = np.array([len(chunk.token_ids) for chunk in chunks])
    keys = np.array([chunk.start + len(chunk.token_ids) for chunk in chunks])
    slots = [
        (_rows(chunk, first_page)[:, None] * page_size + np.arange(page_size)).ravel()[:length]
        for chunk, length in zip(chunks, keys, strict=True)
    ]
    return PrefillGroup(
        first=first,
        end=first + int(queries.sum()),
        slots=to_device(torch.from_numpy(np.concatenate(slots)), device),
        query_starts=torch.from_numpy(np.concatenate(([0], queries.cumsum())).astype(np.int32)),
        key_starts=torch.from_numpy(np.concatenate(([0], keys.cumsum())).astype(np.int32)),
    )
