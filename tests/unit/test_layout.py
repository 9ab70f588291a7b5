from pathlib import Path

from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention

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


def test_pages_round_up():
    layout = KvLayout(1, 64, CacheDtype.FLOAT32, LatentAttention(8, 4))
    assert [layout.num_pages(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
