"""What rank 0 of a group learns of a step: the logits of all lanes, and what failed in them.

Letters: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from headrace_kernels.finite import is_finite
from torch import Tensor

from headrace_core.batch.step import Chunk
from headrace_core.errors import HeadraceError
from headrace_core.ranks.group import Ranks


def gather_logits(logits: Tensor, lanes: Sequence[int], vocab_size: int, ranks: Ranks) -> Tensor:
    """Bring logits to rank 0: every rank's columns of its lane's rows.

    Args:
        logits: [rows of this lane, this rank's columns] float32.
        lanes: the lane of each row of all, L.
        vocab_size: V.
        ranks: where this rank stands.

    Returns:
        [L, V] float32 on rank 0; [0, V] on the others.
    """
    layout, world = ranks.layout, ranks.world
    if not lanes:
        return logits.new_empty((0, vocab_size))
    widths = [len(layout.vocabulary(rank, vocab_size)) for rank in range(world.size)]
    counts = [lanes.count(layout.lane(rank)) for rank in range(world.size)]
    send = [logits.numel() if rank == 0 else 0 for rank in range(world.size)]
    receive = [count * width if world.rank == 0 else 0 for count, width in zip(counts, widths, strict=True)]
    pieces = world.exchange(logits.reshape(-1), send, receive).split(receive)
    if world.rank:
        return logits.new_empty((0, vocab_size))
    out = logits.new_empty((len(lanes), vocab_size))
    for rank, piece in enumerate(pieces):
        columns = layout.vocabulary(rank, vocab_size)
        rows = [row for row, lane in enumerate(lanes) if lane == layout.lane(rank)]
        place = torch.tensor(rows, dtype=torch.int64, device=out.device)
        out[place, columns.start : columns.stop] = piece.view(counts[rank], widths[rank])
    return out


def not_finite(hidden: Tensor, chunk_rows: Sequence[int], chunks: Sequence[Chunk]) -> dict[int, HeadraceError]:
    """Return, by key, BAD_LOGITS for chunks that are not sampled and whose rows of `hidden` [T, N] are not finite."""
    return {
        chunk.key: bad_logits(chunk)
        for row, chunk in zip(chunk_rows, chunks, strict=True)
        if not chunk.is_sampled and not is_finite(hidden[row : row + len(chunk.token_ids)])
    }


def gather_failures(
    failures: dict[int, HeadraceError], chunks: Sequence[Chunk], ranks: Ranks, device: str
) -> dict[int, HeadraceError]:
    """Return all lanes' failures of the step's `chunks`, on every rank; `failures` are this lane's, of `not_finite`.

    Nobody meets where no lane can have any.
    """
    if ranks.layout.num_lanes == 1 or all(chunk.is_sampled for chunk in chunks):
        return failures
    flags = torch.tensor([chunk.key in failures for chunk in chunks], dtype=torch.uint8, device=device)
    failed = ranks.world.all_gather(flags).any(dim=0).tolist()
    return {chunk.key: bad_logits(chunk) for chunk, is_bad in zip(chunks, failed, strict=True) if is_bad}


def bad_logits(chunk: Chunk) -> HeadraceError:
    """Return what a chunk fails with of which the network makes no numbers."""
    end = chunk.start + len(chunk.token_ids)
    return HeadraceError(
        "BAD_LOGITS",
        f"what the model makes of positions {chunk.start} to {end - 1} is not all finite; the checkpoint may "
        "be damaged: compare its files with their source",
    )
