"""One side of a hand-off: a process alone or a group computes prompts, or goes on from pages that came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from headrace_core.model.load import load_model
from headrace_core.ranks.group import ALONE, RankGroup, Ranks, ranks_of
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.page_share import PageShare
from headrace_core.testing.paged_sequences import PagedSequences

_PAGE_SIZE, _MAX_CHUNK, _NUM_PAGES = 16, 24, 32

ONE_PROCESS = ("alone", "")


class Computed(NamedTuple):
    """Prompts: the whole pages of each, layer by layer, and the tokens that follow them."""

    pages: list[bytes]
    tokens: list[int]


class Party:
    """A loaded model, whole or this rank's part. Of a group all ranks do the same."""

    def __init__(self, folder: Path, names: tuple[str, str], world: RankGroup) -> None:
        self._ranks: Ranks = ALONE if names == ONE_PROCESS else ranks_of(ParallelLayout.parse(*names), world)
        self._model = load_model(folder, ranks=self._ranks)
        whole = self._model.config.kv_layout(_PAGE_SIZE, self._model.cache_dtype)
        self._share = PageShare(whole, self._ranks.layout, self._ranks.rank)

    def compute(self, prompts: Sequence[list[int]]) -> Computed:
        """Return what becomes of `prompts`; on every rank."""
        sequences, tokens = self._sequences(), [0] * len(prompts)
        for start in range(0, max(map(len, prompts)), _MAX_CHUNK):
            pieces = {key: prompt[start : start + _MAX_CHUNK] for key, prompt in enumerate(prompts)}
            ends = {key: start + _MAX_CHUNK >= len(prompt) for key, prompt in enumerate(prompts)}
            pieces = {key: piece for key, piece in pieces.items() if piece}
            for key, token in self._step(sequences, pieces, ends).items():
                tokens[key] = token
        own = [
            b"".join(bytes(sequences.cache.page_bytes(layer, page)) for layer, page in self._places(sequences, key))
            if self._lane(key) == self._ranks.lane_number
            else b""
            for key in range(len(prompts))
        ]
        return Computed([self._whole(sequences, key, part) for key, part in enumerate(own)], tokens)

    def go_on(self, prompts: Sequence[list[int]], computed: Computed, num_tokens: int) -> list[list[int]]:
        """Return `num_tokens` greedy tokens for each prompt, of which `computed` came from elsewhere; on every rank."""
        sequences = self._sequences()
        for key, (prompt, pages) in enumerate(zip(prompts, computed.pages, strict=True)):
            sequences.chunk(key, prompt)
            places, size = self._places(sequences, key), self._share.whole.page_layer_bytes
            for number, (layer, page) in enumerate(places):
                part = self._share.cut(pages[number * size : (number + 1) * size])
                sequences.cache.page_bytes(layer, page)[:] = part
        outputs = [[token] for token in computed.tokens]
        for _ in range(num_tokens - 1):
            pieces = {key: output[-1:] for key, output in enumerate(outputs)}
            for key, token in self._step(sequences, pieces, dict.fromkeys(pieces, True)).items():
                outputs[key].append(token)
        return outputs

    def _sequences(self) -> PagedSequences:
        return PagedSequences(self._model, page_size=_PAGE_SIZE, num_pages=_NUM_PAGES)

    def _lane(self, key: int) -> int:
        return key % self._ranks.layout.num_lanes

    def _places(self, sequences: PagedSequences, key: int) -> list[tuple[int, int]]:
        return [(layer, page) for layer in range(self._share.whole.num_layers) for page in sequences.pages(key)]

    def _step(self, sequences: PagedSequences, pieces: dict[int, list[int]], ends: dict[int, bool]) -> dict[int, int]:
        chunks = [
            replace(sequences.chunk(key, piece, is_sampled=ends[key]), lane=self._lane(key))
            for key, piece in pieces.items()
        ]
        tokens = self._model.forward(chunks, sequences.cache).argmax(dim=-1).tolist()
        tokens = json.loads(self._ranks.world.broadcast_bytes(json.dumps(tokens).encode()))
        return dict(zip([chunk.key for chunk in chunks if chunk.is_sampled], tokens, strict=True))

    def _whole(self, sequences: PagedSequences, key: int, own: bytes) -> bytes:
        """Return the whole pages of a sequence, of which this rank has `own`, nothing if its lane is another."""
        parts = self._ranks.world.gather_bytes(own)
        of_lane = [parts[rank] for rank in self._ranks.layout.lane_ranks(self._lane(key))]
        size, own_size = self._share.whole.page_layer_bytes, self._share.own.page_layer_bytes
        whole = bytearray(size * len(self._places(sequences, key)))
        for number in range(len(whole) // size):
            cells = [part[number * own_size : (number + 1) * own_size] for part in of_lane]
            self._share.join(memoryview(whole)[number * size : (number + 1) * size], cells)
        return bytes(whole)


def hand_off_all(
    world: RankGroup, folder: Path, layouts: list[tuple[str, str]], prompts: list[list[int]], num_tokens: int
) -> dict[tuple[tuple[str, str], tuple[str, str]], list[list[int]]]:
    """Return the tokens of every pair of layouts: the first computes the prompts, the second goes on."""
    parties = {names: Party(folder, names, world) for names in layouts}
    computed = {names: party.compute(prompts) for names, party in parties.items()}
    return {
        (source, names): party.go_on(prompts, computed[source], num_tokens)
        for source in layouts
        for names, party in parties.items()
    }
