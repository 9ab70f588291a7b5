from dataclasses import replace
from pathlib import Path

import pytest
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_kernels.latent_fp8 import row_bytes

ROOT = Path(__file__).parents[2]


def test_top_level_folders_are_not_packages():
    """A root folder named like a package shadows it (docs/adr/0001)."""
    assert not [path.parent.name for path in ROOT.glob("*/__init__.py")]


def test_deepseek_v3_caches_70272_bytes_per_token():
    layout = KvLayout(61, 64, CacheDtype.BFLOAT16, LatentAttention(512, 64))
    assert layout.token_bytes == 70_272
    assert layout.page_layer_bytes == 64 * 576 * 2
    assert layout.page_bytes == 61 * layout.page_layer_bytes


def test_mixtral_caches_131072_bytes_per_token():
    layout = KvLayout(32, 64, CacheDtype.BFLOAT16, KeyValueAttention(8, 128))
    assert layout.token_bytes == 131_072


def test_deepseek_v3_in_fp8_caches_40016_bytes_per_token():
    layout = KvLayout(61, 64, CacheDtype.FP8_E4M3, LatentAttention(512, 64))
    assert layout.page_shape == (64, 656)
    assert layout.token_bytes == 40_016
    assert layout.page_layer_bytes == 64 * 656


@pytest.mark.parametrize("widths", [(512, 64), (64, 32), (16, 8), (200, 6), (4, 0)])
def test_an_fp8_row_has_the_bytes_that_kernels_read(widths):
    assert KvLayout(1, 1, CacheDtype.FP8_E4M3, LatentAttention(*widths)).page_bytes == row_bytes(*widths)


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (LatentAttention(66, 8), "multiple of 4"),
        (LatentAttention(64, 3), "even rope width"),
        (KeyValueAttention(8, 128), "latents .MLA. alone"),
    ],
)
def test_what_fp8_can_not_hold_is_no_layout(attention, why):
    with pytest.raises(ValueError, match=why):
        KvLayout(1, 64, CacheDtype.FP8_E4M3, attention)
    KvLayout(1, 64, CacheDtype.BFLOAT16, attention)


def test_a_difference_names_the_parts_and_the_options():
    layout = KvLayout(61, 64, CacheDtype.FP8_E4M3, LatentAttention(512, 64))
    assert layout.difference(replace(layout)) == ""
    other = replace(layout, page_size=32, dtype=CacheDtype.BFLOAT16)
    assert layout.difference(other) == (
        "page_size 64, not 32 (--page-size), dtype fp8_e4m3, not bfloat16 (--kv-cache-dtype, --dtype)"
    )
    assert layout.difference(replace(layout, num_layers=59)) == "num_layers 61, not 59"
    # Of one model, that is what a layer more or less comes of.
    hint = "num_layers 61, not 62 (--speculate mtp has one more)"
    assert layout.difference(replace(layout, num_layers=62)) == hint
    theirs = LatentAttention(512, 32)
    assert layout.difference(replace(layout, attention=theirs)) == f"attention {layout.attention}, not {theirs}"


def test_pages_round_up():
    layout = KvLayout(1, 64, CacheDtype.FLOAT32, LatentAttention(8, 4))
    assert [layout.num_pages(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
