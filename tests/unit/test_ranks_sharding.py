"""What each rank keeps: together all, and what the formulas say."""

from __future__ import annotations

import math
import os
from collections import Counter

import pytest
import torch
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights
from headrace_core.families.weights import Part
from headrace_core.kv.layout import CacheDtype
from headrace_core.model.build import build_network, num_weight_bytes
from headrace_core.model.model import Model, ModelIdentity
from headrace_core.ranks.group import OneRank, Ranks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.sharding import ExpertsForm, Sharding
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config
from headrace_core.transfer.memfd import ALIGNMENT, Memfd
from headrace_core.worker.rank_group import rank_cache

_LAYOUTS = [("tp1", "tp1"), *((a, e) for a in ("tp1", "tp2", "tp4") for e in ("tp4", "ep4")), ("dp2", "ep2")]


def config_of(folder, name):
    write_config(folder, TINY_CONFIGS[name])
    return parse_config(folder)


class Stood(OneRank):
    """A group that nobody meets in."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def stand(layout, rank):
    return Ranks(layout, Stood(rank, layout.size), Stood(layout.place(rank), layout.attention_tp))


class Taken:
    """A `WeightSource` that remembers what was taken."""

    def __init__(self, config):
        self._shapes = {weight.name: weight.shape for weight in weights(config)}
        self.names = Counter()
        self.num_bytes = 0

    def take(self, name, dtype=None, shard=None):
        sides = list(self._shapes[name])
        if shard is not None:
            sides[shard.axis] = shard.stop - shard.start
        self.names[name] += 1
        taken = torch.zeros(sides, dtype=dtype or torch.bfloat16)
        self.num_bytes += taken.nbytes
        return taken

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("names", _LAYOUTS)
@pytest.mark.parametrize("network", ["v3", "v2", "mixtral", "qwen3-moe", "v3-tied", "v3-bias"])
def test_ranks_keep_each_value_and_no_more_often_than_lanes_and_replication_say(network, names, tmp_path):
    config, layout = config_of(tmp_path, network), ParallelLayout.parse(*names)
    shardings = [Sharding(layout, rank) for rank in range(layout.size)]
    kept = [{weight.name for weight in each.weights(weights(config))} for each in shardings]
    for weight in weights(config):
        times = torch.zeros(weight.shape, dtype=torch.int32)
        for sharding, names_kept in zip(shardings, kept, strict=True):
            if weight.name in names_kept:
                part = sharding.part(weight)
                (times if part is None else times.narrow(part.axis, part.start, part.stop - part.start)).add_(1)
        assert times.min() == times.max(), weight
        assert int(times.min()) == _copies(weight, layout, config), weight


def _copies(weight, layout, config):
    part = weight.place.part
    if weight.place.expert is not None or layout.size == 1:
        return 1
    if part in (Part.SHARED_GATE, Part.SHARED_UP, Part.SHARED_DOWN):
        return layout.size if Sharding(layout, 0).experts_form is ExpertsForm.DISPATCHED else 1
    if weight.split is None:
        return layout.size
    pieces = weight.split.num_pieces
    return layout.num_lanes * max(1, layout.attention_tp // pieces)


@pytest.mark.parametrize("names", _LAYOUTS)
@pytest.mark.parametrize("network", ["v3", "v2", "mixtral", "qwen3-moe-dense-layers", "v3-bias"])
def test_a_rank_takes_what_it_keeps_once_and_its_bytes_are_those_counted(network, names, tmp_path):
    config, layout = config_of(tmp_path, network), ParallelLayout.parse(*names)
    for rank in range(layout.size):
        source, sharding = Taken(config), Sharding(layout, rank)
        build_network(config, source, ranks=stand(layout, rank), sharding=sharding)
        assert source.names == Counter(weight.name for weight in sharding.weights(weights(config)))
        assert source.num_bytes == num_weight_bytes(config, torch.bfloat16, sharding=sharding)


@pytest.mark.parametrize("names", _LAYOUTS)
@pytest.mark.parametrize("network", ["v3", "mixtral", "mixtral-head-dim"])
def test_a_ranks_cache_takes_what_the_formula_says(network, names, tmp_path):
    """l · b · s · n · h · 2 / TP / DP, and l · b · s · c_kv / DP: in tensors, and by pages of whole sequences."""
    config, layout = config_of(tmp_path, network), ParallelLayout.parse(*names)
    num_sequences, num_tokens, page_size = 8, 64, 16
    for rank in range(layout.size):
        ranks = stand(layout, rank)
        network_of_rank = build_network(config, Taken(config), ranks=ranks)
        model = Model(config, ModelIdentity("", torch.bfloat16, 0, CacheDtype.BFLOAT16), network_of_rank, ranks)
        pages_of_lane = num_sequences // layout.num_lanes * num_tokens // page_size
        whole, memory = config.kv_layout(page_size, CacheDtype.BFLOAT16), Memfd() if rank == 0 else None
        cache = rank_cache(ranks, model.kv_layout(page_size), whole, pages_of_lane, memory=memory)
        measured = sum(layer.nbytes for layer in cache.layers)
        assert measured == layout.cache_bytes(config, num_sequences, num_tokens, 2)
        assert cache.page_ids == range(layout.lane(rank) * pages_of_lane, (layout.lane(rank) + 1) * pages_of_lane)
        for layer in cache.layers:
            layer.fill_(1)
        if memory and memory.layer_stride:
            # What is there of other lanes at rank 0, where their pages pass through, takes nothing until they do.
            assert os.fstat(memory.descriptor).st_blocks * 512 <= measured + (config.num_layers + 1) * ALIGNMENT
    if network == "mixtral":
        whole = config.num_layers * num_sequences * num_tokens * 2 * 2 * 8 * 2
        assert measured == whole // layout.num_lanes // min(2, layout.attention_tp)
    if network == "v3":
        assert measured == config.num_layers * num_sequences * num_tokens * (16 + 8) * 2 // layout.num_lanes


def test_whole_experts_are_a_share_of_the_weights(tmp_path):
    config = config_of(tmp_path, "v3")
    alone = num_weight_bytes(config, torch.bfloat16)
    of_rank = [
        num_weight_bytes(config, torch.bfloat16, sharding=Sharding(ParallelLayout.parse("tp4", "ep4"), rank))
        for rank in range(4)
    ]
    routed = sum(math.prod(w.shape) * 2 for w in weights(config) if w.place.expert is not None)
    assert alone // 4 < of_rank[0] < alone - routed * 3 // 4
    assert len(set(of_rank)) == 1


def test_experts_lie_where_a_table_says(tmp_path):
    config, layout = config_of(tmp_path, "mixtral"), ParallelLayout.parse("tp1", "ep2")
    owners = ((1,), (0, 1), (0,), (1,))
    held = [Sharding(layout, rank, owners={1: owners}) for rank in range(2)]
    assert [each.local_experts(1, 4) for each in held] == [[1, 2], [0, 1, 3]]
    assert [each.local_experts(0, 4) for each in held] == [[0, 1], [2, 3]]
    sources = [Taken(config) for _ in held]
    for rank, (source, sharding) in enumerate(zip(sources, held, strict=True)):
        build_network(config, source, ranks=stand(layout, rank), sharding=sharding)
        assert source.names == Counter(weight.name for weight in sharding.weights(weights(config)))


def test_what_travels_is_chosen_by_lanes_and_numerics():
    form = {
        (*names, is_exact): Sharding(ParallelLayout.parse(*names), 0, is_exact).experts_form
        for names in (("tp2", "tp2"), ("tp1", "tp2"), ("tp2", "ep2"), ("tp1", "ep2"))
        for is_exact in (False, True)
    }
    assert form == {
        ("tp2", "tp2", False): ExpertsForm.SUMMED,
        ("tp2", "tp2", True): ExpertsForm.SUMMED,
        ("tp1", "tp2", False): ExpertsForm.GATHERED,
        ("tp1", "tp2", True): ExpertsForm.GATHERED,
        ("tp2", "ep2", False): ExpertsForm.SUMMED,
        ("tp2", "ep2", True): ExpertsForm.DISPATCHED,
        ("tp1", "ep2", False): ExpertsForm.DISPATCHED,
        ("tp1", "ep2", True): ExpertsForm.DISPATCHED,
    }
