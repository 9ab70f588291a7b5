"""Multi-token prediction (MTP): a module of the checkpoint guesses what follows the token that a step gives.

Row i of the module is made of the network's output at position i and the embedding of token i + 1; it attends to the
rows before it, which a layer of the cache behind the network's keeps at the same slots, and guesses token i + 2:

    h'_i = layer(join [norm(embedding(t_i+1)); norm(h_i)])        guess = argmax head(norm(h'_i))

So a step's rows are computed when the step's tokens are drawn. A page is moved, cached and taken with them. One row of
a page, the last, is made of a token of the next page. Where a sequence shares the page and not that token, the row is
another's; where a step had nobody to guess for, there is none: a guess may be worse for it, and a guess chooses no
token (ADR 0027). A longer draft goes on with the module's own output in place of the network's.

Letters: T tokens, B rows that guess, N hidden.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), section 2.2. That h is the output after the final norm, and the
embedding's half comes first, is as in vLLM's and SGLang's modules of that checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from headrace_kernels.linear import Linear
from headrace_kernels.rms_norm import rms_norm
from torch import Tensor

from headrace_core.batch.step import Chunk
from headrace_core.model.decode_batch import DecodeBatch
from headrace_core.model.decode_graphs import Capture, DecodeGraphs, DecodeOutput, buckets, is_decode_step
from headrace_core.model.decode_tapes import DecodeTapes
from headrace_core.model.host_copies import to_device
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.layer import Layer
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.model.rope_angles import RopeAngles
from headrace_core.model.step_inputs import DecodeRows, StepInputs, prepare_step


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """The module's own weights: the two norms before `join` [N, 2N], its layer, the norm before the head."""

    embedding_norm: Tensor
    hidden_norm: Tensor
    join: Linear
    layer: Layer
    norm: Tensor


@dataclass(frozen=True, slots=True)
class TrunkWeights:
    """What the module shares with the network."""

    embedding: Tensor
    head: Linear
    angles: RopeAngles
    eps: float


@dataclass(frozen=True, slots=True)
class Stream:
    """The network's output [T, N] for a step, after the final norm, and where each chunk's first token is in it."""

    hidden: Tensor
    chunk_rows: Sequence[int]


class Mtp:
    """See the module. Engine thread only. `max_decode_chunk` as `prepare_step` has it."""

    def __init__(self, weights: MtpWeights, trunk: TrunkWeights, max_decode_chunk: int | None) -> None:
        self._weights = weights
        self._trunk = trunk
        self._max_decode_chunk = max_decode_chunk
        self._steps: DecodeGraphs | DecodeTapes | None = None
        self._hidden = trunk.embedding[:0]
        """What recorded or captured steps read."""

    def record(self, cache: KvCache, *, max_rows: int, max_context_tokens: int) -> None:
        """Let steps of up to `max_rows` rows over `cache` be recorded and replayed; see `Model.record_decode`."""
        layout = cache.layout
        self._hidden = self._buffer(max_rows)
        self._steps = DecodeTapes(
            lambda batch, timer: self._decode(batch, cache),
            max_rows=max_rows,
            max_pages=layout.num_pages(max_context_tokens),
            page_size=layout.page_size,
        )

    def capture(self, cache: KvCache, *, max_rows: int, max_context_tokens: int, capture: Capture | None) -> None:
        """Let steps of up to `max_rows` rows over `cache` run from captured launches; see `Model.prepare_decode`."""
        layout = cache.layout
        self._hidden = self._buffer(buckets(max_rows)[-1])
        self._steps = DecodeGraphs(
            lambda batch: self._decode(batch, cache),
            max_rows=max_rows,
            max_pages=layout.num_pages(max_context_tokens),
            page_size=layout.page_size,
            device=self._hidden.device.type,
            capture=capture,
        )

    def forget(self) -> None:
        """Undo `record` or `capture`."""
        self._steps = None

    def guess(
        self, stream: Stream, chunks: Sequence[Chunk], tokens: Mapping[int, Sequence[int]], cache: KvCache
    ) -> dict[int, list[int]]:
        """Write the rows of a step, and return, by key, what may follow what each chunk gave that wants guesses.

        Args:
            stream: what the network made of the chunks' rows (`ForwardPlan.rows`).
            chunks: the step's.
            tokens: by key what each sampled chunk gave. One that gave nothing has no rows.
            cache: the network's.
        """
        rows, places, wanting = _rows(stream, chunks, tokens)
        if not rows:
            return {}
        hidden, logits = self._run(rows, _picked(stream.hidden, places), wanting, cache)
        going = [rows[number] for number in wanting]
        guesses: dict[int, list[int]] = {}
        while going:
            found = logits.argmax(dim=1).tolist()
            rows = [_row(row, token, row.start + len(row.token_ids)) for row, token in zip(going, found, strict=True)]
            for row, token in zip(rows, found, strict=True):
                guesses.setdefault(row.key, []).append(token)
            kept = [i for i, row in enumerate(rows) if len(guesses[row.key]) < row.num_wanted and _has_slot(row, cache)]
            going = [rows[i] for i in kept]
            if going:
                hidden, logits = self._run(going, _picked(hidden, kept), range(len(going)), cache)
        return guesses

    def all_logits(
        self, stream: Stream, chunks: Sequence[Chunk], tokens: Mapping[int, Sequence[int]], cache: KvCache
    ) -> list[Tensor]:
        """Write the rows, see `guess`, and return the logits at all of them, [rows, V] for each chunk that has some."""
        rows, places, _ = _rows(stream, chunks, tokens)
        x, firsts = self._run_eagerly(rows, _picked(stream.hidden, places), cache)
        logits = self._trunk.head(rms_norm(x, self._weights.norm, self._trunk.eps))
        return [logits[first : first + len(row.token_ids)] for row, first in zip(rows, firsts, strict=True)]

    def _run(
        self, rows: Sequence[Chunk], hidden: Tensor, wanted: Sequence[int], cache: KvCache
    ) -> tuple[Tensor, Tensor]:
        """Write the rows of chunks of next tokens; return output [B, N], after the norm, and logits [B, V] behind some.

        Args:
            rows: the chunks.
            hidden: [T, N], the network's outputs, in the order of the chunks' tokens.
            wanted: numbers of the chunks of which the output at their last token is wanted; rising.
            cache: the network's.
        """
        steps = self._steps
        if steps is not None and len(rows) <= steps.max_rows and is_decode_step(rows):
            self._hidden[: len(hidden)].copy_(hidden)
            output = steps.run(rows)
            assert output.logits is not None, "the module has a head"
            return _picked(output.hidden, wanted), _picked(output.logits, wanted)
        x, firsts = self._run_eagerly(rows, hidden, cache)
        ends = [firsts[number] + len(rows[number].token_ids) - 1 for number in wanted]
        out = rms_norm(_picked(x, ends), self._weights.norm, self._trunk.eps)
        return out, self._trunk.head(out) if ends else out

    def _run_eagerly(self, rows: Sequence[Chunk], hidden: Tensor, cache: KvCache) -> tuple[Tensor, list[int]]:
        """Return the residual stream [T, N] after the module's layer, and where each chunk's first token is in it."""
        step = prepare_step(
            rows, cache.layout.page_size, max_decode_chunk=self._max_decode_chunk, device=hidden.device.type
        )
        order = [0] * len(hidden)
        at = 0
        for row, first in zip(rows, step.chunk_rows, strict=True):
            count = len(row.token_ids)
            order[first : first + count] = range(at, at + count)
            at += count
        return self._compute(step, _picked(hidden, order), cache), step.chunk_rows

    def _decode(self, batch: DecodeBatch, cache: KvCache) -> DecodeOutput:
        rows = DecodeRows(batch.block_table, batch.context_lens)
        step = StepInputs(batch.token_ids, batch.positions, batch.slot_mapping, rows, [], [])
        x = self._compute(step, self._hidden[: len(batch.token_ids)], cache)
        out = rms_norm(x, self._weights.norm, self._trunk.eps)
        return DecodeOutput(out, None, self._trunk.head(out))

    def _compute(self, step: StepInputs, hidden: Tensor, cache: KvCache, timer: OpTimer = OFF) -> Tensor:
        weights, trunk = self._weights, self._trunk
        if step.decode is not None:
            plan = weights.layer.attention.plan_decode(step.decode.context_lens, cache.layout.page_size)
            step = replace(step, decode=replace(step.decode, plan=plan))
        angles = trunk.angles.at(step.positions)
        embedded = rms_norm(trunk.embedding.index_select(0, step.token_ids), weights.embedding_norm, trunk.eps)
        x = weights.join(torch.cat((embedded, rms_norm(hidden, weights.hidden_norm, trunk.eps)), dim=1))
        x, _ = weights.layer(x, trunk.eps, angles, step, cache.layers[-1], timer)
        return x

    def _buffer(self, num_rows: int) -> Tensor:
        return self._trunk.embedding.new_zeros(num_rows, self._trunk.embedding.shape[1])


def _rows(
    stream: Stream, chunks: Sequence[Chunk], tokens: Mapping[int, Sequence[int]]
) -> tuple[list[Chunk], list[int], list[int]]:
    """Return the module's chunks, which have the token behind each, and where each of their tokens is in the stream.

    And the numbers of those that want guesses. What was guessed wrong has no rows.
    """
    rows: list[Chunk] = []
    places: list[int] = []
    wanting: list[int] = []
    at = 0
    for chunk in chunks:
        firsts = stream.chunk_rows[at : at + 1 + chunk.num_draft]
        at += 1 + chunk.num_draft
        behind = chunk.behind(tokens.get(chunk.key, ()))
        if not behind:
            continue
        if chunk.num_draft:
            rows += [_row(chunk, token, position) for position, token in enumerate(behind, start=chunk.start)]
            places += firsts[: len(behind)]
        else:
            rows.append(replace(chunk, token_ids=behind, is_sampled=True))
            places += range(firsts[0], firsts[0] + len(behind))
        if chunk.num_wanted and chunk.is_sampled:
            wanting.append(len(rows) - 1)
    return rows, places, wanting


def _row(chunk: Chunk, token: int, position: int) -> Chunk:
    return Chunk(chunk.key, [token], position, chunk.page_ids, is_sampled=True, num_wanted=chunk.num_wanted)


def _picked(rows: Tensor, places: Sequence[int]) -> Tensor:
    """Return the rows at `places`: a view if they stand one behind another."""
    if not places:
        return rows[:0]
    first, end = places[0], places[0] + len(places)
    if places[-1] == end - 1 and list(places) == list(range(first, end)):
        return rows[first:end]
    return rows.index_select(0, to_device(torch.tensor(places), rows.device))


def _has_slot(row: Chunk, cache: KvCache) -> bool:
    return row.start < len(row.page_ids) * cache.layout.page_size
