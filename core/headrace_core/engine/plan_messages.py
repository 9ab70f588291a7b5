"""`StepDiff` as bytes: columns of little-endian numbers, so that hundreds of rows take microseconds and few bytes.

    header   version u8, number u64, digest u64, then how many of each that follows: u32 each
    rows     key i64, start u32, flags u8 (1: sampled; 2: more than the usual is told of it)
    told     row, count, first page or -1, number of page ids, of token ids, of a draft: i32 each; for all rows but
             those of one token that the executor has, in pages that it has, whose logits say nothing of the prompt
    scored   row, first of its tokens' that is, number of tokens that are scored, of most probable ones: u32 each
    pages    u32; tokens u32, those that are scored behind the others; left i64; pages to zero u32; stops u32
    names    key i64, number of bytes u32; then UTF-8
    joins    key i64, sample u32, then how many end, prompt and output tokens, bytes of parameters: u32 each; then those

It goes to processes of one group, started together from one version: another version is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from headrace.v1 import types_pb2

from headrace_core.batch.step import Scoring
from headrace_core.batch.step_diff import Row, SamplerJoin, StepDiff
from headrace_core.errors import ProtocolError
from headrace_core.wire import decode_sampling, encode_sampling

_VERSION = 3
_HEADER = struct.Struct("<BQQ10I")
_NAME = struct.Struct("<qI")
_JOIN = struct.Struct("<q5I")
_SAMPLED, _TOLD = 1, 2


def encode(diff: StepDiff) -> bytes:
    """Return the message."""
    told: list[int] = []
    pages: list[int] = []
    tokens: list[int] = []
    flags = bytearray()
    for index, row in enumerate(diff.rows):
        is_usual = row.num_tokens == 1 and not row.page_ids and not row.token_ids and row.first_page < 0
        flags.append(row.is_sampled * _SAMPLED + (not is_usual) * _TOLD)
        if not is_usual:
            told += (index, row.num_tokens, row.first_page, len(row.page_ids), len(row.token_ids), row.num_draft)
            pages += row.page_ids
            tokens += row.token_ids
    scored: list[int] = []
    for index, row in enumerate(diff.rows):
        if row.scoring is not None:
            scored += (index, row.scoring.first_row, len(row.scoring.token_ids), row.scoring.num_top)
            tokens += row.scoring.token_ids
    names = [(key, name.encode()) for key, name in diff.names.items()]
    sizes = (diff.rows, told, scored, pages, tokens, diff.left, diff.zero_page_ids, diff.stops, names, diff.joins)
    return b"".join(
        (
            _HEADER.pack(_VERSION, diff.number, diff.digest, *map(len, sizes)),
            _pack("q", [row.key for row in diff.rows]),
            _pack("I", [row.start for row in diff.rows]),
            flags,
            _pack("i", told),
            *(_pack("I", values) for values in (scored, pages, tokens)),
            _pack("q", diff.left),
            _pack("I", diff.zero_page_ids),
            _pack("I", diff.stops),
            *(_NAME.pack(key, len(name)) + name for key, name in names),
            *map(_encode_join, diff.joins),
        )
    )


def decode(message: bytes) -> StepDiff:
    """Return the diff.

    Raises:
        ProtocolError: PROTOCOL, it is none of this version.
    """
    try:
        return _decode(message)
    except (struct.error, ValueError, IndexError) as error:
        raise ProtocolError("PROTOCOL", f"{len(message)} bytes are no plan of a step: {error}") from error


def _decode(message: bytes) -> StepDiff:
    version, number, digest, *sizes = _HEADER.unpack_from(message)
    if version != _VERSION:
        raise ValueError(f"version {version}, not {_VERSION}")
    num_rows, num_told, num_scored, num_pages, num_tokens, num_left, num_zero, num_stops, num_names, num_joins = sizes
    read = _Reader(message, _HEADER.size)
    keys, starts, flags = read.numbers("q", num_rows), read.numbers("I", num_rows), read.bytes(num_rows)
    told, scored = read.numbers("i", num_told), read.numbers("I", num_scored)
    pages, tokens = read.numbers("I", num_pages), read.numbers("I", num_tokens)
    rows = [Row(key, start, 1, bool(flag & _SAMPLED)) for key, start, flag in zip(keys, starts, flags, strict=True)]
    page, token = 0, 0
    for at in range(0, num_told, 6):
        index, count, first_page, more_pages, more_tokens, num_draft = told[at : at + 6]
        rows[index] = Row(
            keys[index],
            starts[index],
            count,
            bool(flags[index] & _SAMPLED),
            first_page,
            pages[page : page + more_pages],
            tokens[token : token + more_tokens],
            num_draft,
        )
        page, token = page + more_pages, token + more_tokens
    for at in range(0, num_scored, 4):
        index, first_row, count, num_top = scored[at : at + 4]
        rows[index] = rows[index]._replace(scoring=Scoring(first_row, tokens[token : token + count], num_top))
        token += count
    left, zero, stops = read.numbers("q", num_left), read.numbers("I", num_zero), read.numbers("I", num_stops)
    names = dict(read.name() for _ in range(num_names))
    joins = [read.join() for _ in range(num_joins)]
    read.end()
    return StepDiff(number, digest, rows, left, names, zero, stops, joins)


class _Reader:
    def __init__(self, message: bytes, at: int) -> None:
        self._message, self._at = message, at

    def bytes(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._message):
            raise ValueError("it is cut off")
        return self._message[self._at - count : self._at]

    def numbers(self, kind: str, count: int) -> tuple[int, ...]:
        layout = f"<{count}{kind}"
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))

    def name(self) -> tuple[int, str]:
        key, size = _NAME.unpack(self.bytes(_NAME.size))
        return key, self.bytes(size).decode()

    def join(self) -> SamplerJoin:
        key, sample_index, num_eos, num_prompt, num_output, size = _JOIN.unpack(self.bytes(_JOIN.size))
        eos, prompt, output = (self.numbers("I", count) for count in (num_eos, num_prompt, num_output))
        params = decode_sampling(types_pb2.SamplingParams.FromString(self.bytes(size)))
        return SamplerJoin(key, params, sample_index, eos, prompt, output)

    def end(self) -> None:
        if self._at != len(self._message):
            raise ValueError("there are bytes behind it")


def _encode_join(join: SamplerJoin) -> bytes:
    params = encode_sampling(join.params).SerializeToString()
    lists = (join.eos_token_ids, join.prompt_token_ids, join.output_token_ids)
    head = _JOIN.pack(join.key, join.sample_index, *map(len, lists), len(params))
    return head + b"".join(_pack("I", values) for values in lists) + params


def _pack(kind: str, values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}{kind}", *values)
