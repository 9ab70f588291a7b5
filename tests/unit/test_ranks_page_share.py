"""Which part of a page a rank has, and that all parts are the page."""

from __future__ import annotations

import numpy as np
import pytest
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.page_share import PageShare


def shares(attention: KeyValueAttention | LatentAttention, num_ranks: int) -> list[PageShare]:
    whole = KvLayout(2, 4, CacheDtype.BFLOAT16, attention)
    return [PageShare(whole, ParallelLayout(num_ranks, num_expert_ranks=num_ranks), rank) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("attention", [KeyValueAttention(4, 6), LatentAttention(8, 4)])
def test_the_parts_of_all_ranks_are_the_page(attention: KeyValueAttention | LatentAttention, num_ranks: int):
    """Also where there are more ranks than heads, so that some have the same."""
    of = shares(attention, num_ranks)
    size = of[0].whole.page_layer_bytes
    page = bytes(np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8))
    parts = [share.cut(page) for share in of]
    assert [len(part) for part in parts] == [share.own.page_layer_bytes for share in of]
    joined = bytearray(size)
    of[0].join(memoryview(joined), parts)
    assert bytes(joined) == page


def test_a_rank_has_its_heads_of_keys_and_of_values():
    first, second = shares(KeyValueAttention(4, 6), 2)
    page = np.arange(2 * 4 * 4 * 6, dtype=np.uint16).reshape(2, 4, 4, 6)
    own = np.frombuffer(second.cut(page.tobytes()), np.uint16).reshape(2, 4, 2, 6)
    assert (own == page[:, :, 2:]).all()
    assert first.own.attention == KeyValueAttention(2, 6)
    assert not first.is_whole


def test_every_rank_has_all_of_a_latent():
    assert all(share.is_whole and share.own == share.whole for share in shares(LatentAttention(8, 4), 4))
