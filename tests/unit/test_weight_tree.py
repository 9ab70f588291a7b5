"""The tree of a network's weights: every tensor once, in its place, and cut so that ranks together own all of it."""

import json
from collections import Counter

import pytest
import torch
from headrace_core.checkpoint.safetensors_file import read_headers
from headrace_core.checkpoint.weight_reader import WeightReader
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights
from headrace_core.families.weights import Part, Place, Split, Weight
from headrace_core.model.build import build_network
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    Variation,
    random_tensors,
    write_checkpoint,
    write_config,
)


def tree_of(folder, name):
    write_config(folder, TINY_CONFIGS[name])
    return weights(parse_config(folder))


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_place_has_one_weight_and_a_name_one_place(name, tmp_path):
    tree = tree_of(tmp_path, name)
    groups = [tree.outside, *(tuple(tree.layer(index)) for index in range(tree.num_layers))]
    assert all(len({weight.place for weight in group}) == len(group) for group in groups)
    names = [weight.name for weight in tree]
    assert len(set(names)) == len(names) == sum(map(len, groups))


class Counted:
    """A `WeightSource` that counts what is taken."""

    def __init__(self, tensors):
        self._tensors = tensors
        self.taken = Counter()

    def take(self, name, dtype=None, shard=None):
        self.taken[name] += 1
        return self._tensors[name].clone()

    def empty(self, *shape):
        return torch.empty(shape)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_building_takes_each_weight_of_the_tree_once(name, tmp_path):
    write_config(tmp_path, TINY_CONFIGS[name])
    config = parse_config(tmp_path)
    source = Counted(random_tensors(config, Variation()))
    build_network(config, source)
    assert source.taken == Counter(weight.name for weight in weights(config))


@pytest.mark.parametrize("name", ["v3", "v2", "mixtral", "qwen3-moe"])
def test_the_shards_of_all_ranks_are_the_weight(name, tmp_path):
    tensors = write_checkpoint(tmp_path, TINY_CONFIGS[name])
    config = parse_config(tmp_path)
    reader = WeightReader(
        read_headers(tmp_path), config, dtype=torch.float32, device="cpu", on_progress=lambda size: None
    )
    for weight in weights(config):
        for num_ranks in (1, 2, 4):
            shards = [weight.shard(rank, num_ranks) for rank in range(num_ranks)]
            parts = [reader.take(weight.name, shard=shard) for shard in shards]
            if weight.split is None:
                assert all(torch.equal(part, tensors[weight.name]) for part in parts)
            else:
                # Where pieces are fewer than ranks, neighbours own the same.
                once = [part for rank, part in enumerate(parts) if rank == 0 or shards[rank] != shards[rank - 1]]
                assert torch.equal(torch.cat(once, weight.split.axis), tensors[weight.name])
                assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)


def test_a_shard_does_not_change_the_fingerprint(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["mixtral"])
    config = parse_config(tmp_path)
    prints = set()
    for num_ranks in (1, 2):
        reader = WeightReader(
            read_headers(tmp_path), config, dtype=torch.float32, device="cpu", on_progress=lambda size: None
        )
        for weight in weights(config):
            reader.take(weight.name, shard=weight.shard(0, num_ranks))
        prints.add(reader.fingerprint())
    assert len(prints) == 1


def test_pieces_that_do_not_divide_are_refused_by_name():
    weight = Weight("lm_head.weight", (6, 4), Place(Part.HEAD), Split(0, 6))
    with pytest.raises(ValueError, match=r"lm_head.weight: 6 pieces of side 0 do not divide among 4 ranks"):
        weight.shard(0, 4)


def test_a_config_of_more_weights_than_memory_holds_costs_nothing_until_asked(tmp_path):
    huge = {**TINY_CONFIGS["v3"], "num_hidden_layers": 2**31 - 1, "n_routed_experts": 2**31 - 4}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    tree = weights(parse_config(tmp_path))
    assert next(tree.layer(2**31 - 2)).name == "model.layers.2147483646.input_layernorm.weight"
