"""Causal attention of ragged sequences against its specification, with NaN around every tensor."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.causal_attention import causal_attention, causal_attention_ref
from headrace_kernels.gpu import causal_attention as gpu
from headrace_kernels.gpu.configs import use_config

from tests.parity.kernels.attention_cases import SMALL_TILES, TOLERANCES, nan_around, starts


@pytest.fixture(autouse=True)
def small_tiles():
    with use_config("causal_attention", SMALL_TILES):
        yield


def tensors(queries, keys, heads, widths, dtype, device):
    (num_heads, groups), (key_dim, value_dim) = heads, widths
    query = nan_around((sum(queries), num_heads, key_dim), dtype, device)
    key = nan_around((sum(keys), groups, key_dim), dtype, device)
    value = nan_around((sum(keys), groups, value_dim), dtype, device)
    return query, key, value, starts(queries), starts(keys)


def check(arguments, dtype, scale=0.2):
    found = causal_attention(*arguments, scale=scale)
    expected = causal_attention_ref(*arguments, scale=scale)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([1], [1]),
        ([1], [70]),
        ([33], [33]),
        ([32], [64]),
        ([5], [70]),
        ([3, 0, 34, 1], [40, 0, 34, 1]),
        ([0], [7]),
        ([0, 0], [0, 0]),
    ],
)
def test_equals_the_specification(queries, keys, dtype, device):
    check(tensors(queries, keys, (2, 1), (16, 16), dtype, device), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("heads", "widths"),
    [((2, 2), (192, 128)), ((4, 2), (128, 128)), ((3, 3), (7, 5)), ((6, 2), (24, 16)), ((1, 1), (100, 33))],
)
def test_widths_and_grouped_heads(heads, widths, dtype, device):
    check(tensors([34], [37], heads, widths, dtype, device), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_tiles_that_a_gpu_gets(dtype, device):
    query = torch.empty(0, 1, 192, dtype=dtype, device=device)
    with use_config("causal_attention", gpu.default_config(query)):
        check(tensors([130, 2], [150, 2], (1, 1), (192, 128), dtype, device), dtype)


def test_a_sequence_does_not_depend_on_the_others(device):
    queries, keys = [9, 40, 1], [9, 75, 33]
    query, key, value, query_starts, key_starts = tensors(queries, keys, (4, 2), (24, 16), torch.float32, device)
    whole = causal_attention(query, key, value, query_starts, key_starts, scale=0.3)
    for b in range(len(queries)):
        q = slice(*query_starts[b : b + 2].tolist())
        k = slice(*key_starts[b : b + 2].tolist())
        alone = causal_attention(
            query[q], key[k], value[k], starts(queries[b : b + 1]), starts(keys[b : b + 1]), scale=0.3
        )
        assert torch.equal(alone, whole[q])


@pytest.mark.parametrize("chunk", [1, 20, 32])
def test_chunks_make_the_whole(chunk, device):
    query, key, value, one, _ = tensors([41], [41], (1, 1), (16, 16), torch.float32, device)
    whole = causal_attention(query, key, value, one, one, scale=0.3)
    ends = [*range(chunk, 41, chunk), 41]
    firsts = [0, *ends[:-1]]
    # As a ragged batch: each chunk is a sequence, and its keys are all that came before, cached.
    chunks = causal_attention(
        query,
        torch.cat([key[:end] for end in ends]),
        torch.cat([value[:end] for end in ends]),
        starts([end - first for first, end in zip(firsts, ends, strict=True)]),
        starts(ends),
        scale=0.3,
    )
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)


def test_heads_run_in_any_order_of_groups(device, monkeypatch):
    """With a cache too small for all heads their programs are taken group by group."""
    monkeypatch.setattr(gpu, "_L2_BYTES", 2 * 40 * 32 * 4)
    check(tensors([40], [40], (12, 6), (16, 16), torch.float32, device), torch.float32)
    assert gpu._heads_side_by_side(40 * 32 * 4, 12, 6) == 4


def test_most_keys_go_first():
    tiles = gpu._tiles((0, 70, 72), (0, 70, 202), 32, torch.device("cpu"))
    assert tiles.tolist() == [[70, 72, 70, 130], [64, 70, 0, 64], [32, 64, 0, 32], [0, 32, 0, 0]]


@pytest.mark.parametrize(
    ("query_starts", "key_starts", "scale", "message"),
    [
        ([0, 3], [0, 2], 1.0, "more queries than keys"),
        ([0, 4], [0, 4], 1.0, "end at 3 queries"),
        ([1, 3], [0, 4], 1.0, "begin at 0"),
        ([0, 3], [0, 2, 4], 1.0, "as many"),
        ([0, 2, 1, 3], [0, 2, 3, 4], 1.0, "more queries than keys"),
        ([0, 3], [0, 4], 0.0, "positive"),
    ],
)
def test_starts_that_do_not_fit_are_refused(query_starts, key_starts, scale, message, device):
    query, key, value, _, _ = tensors([3], [2 if key_starts == [0, 2] else 4], (1, 1), (16, 16), torch.float32, device)
    query_starts, key_starts = (torch.tensor(s, dtype=torch.int32) for s in (query_starts, key_starts))
    with pytest.raises(ValueError, match=message):
        causal_attention(query, key, value, query_starts, key_starts, scale=scale)


def test_types_and_devices_that_do_not_fit_are_refused(device):
    query, key, value, one, two = tensors([3], [4], (2, 2), (16, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"key torch\.bfloat16"):
        causal_attention(query, key.bfloat16(), value, one, two, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        causal_attention(query[:, :1], key, value, one, two, scale=1.0)
    with pytest.raises(ValueError, match="on the host"):
        causal_attention(query, key, value, one.to("meta"), two, scale=1.0)
