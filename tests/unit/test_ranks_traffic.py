"""What ranks send one another, by formula; `tests/parity/test_ranks.py` holds it against what they count."""

from __future__ import annotations

import random

import pytest
from headrace_core.families.config_json import parse_config
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.sharding import Sharding
from headrace_core.ranks.traffic import ranks_of_token, step_bytes, sum_bytes
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config


@pytest.fixture
def config(tmp_path):
    def of(name):
        write_config(tmp_path, TINY_CONFIGS[name])
        return parse_config(tmp_path)

    return of


@pytest.mark.parametrize("name", ["v2", "mixtral"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_token_travels_to_as_many_ranks_as_drawn_choices_hit(name, size, config):
    moe = config(name).moe
    draw, hit, num_draws = random.Random(0), 0, 20_000
    for _ in range(num_draws):
        chosen = draw.sample(range(moe.num_experts), moe.num_experts_per_token)
        hit += len({expert * size // moe.num_experts for expert in chosen} - {draw.randrange(size)})
    assert hit / num_draws == pytest.approx(ranks_of_token(config(name), size), rel=0.02)


def test_a_group_of_one_sends_nothing(config):
    assert step_bytes(config("v3"), Sharding(ParallelLayout(), 0), [100], [3], 2).total == 0


def test_a_large_sum_over_many_ranks_sends_two_of_it_and_a_small_one_a_copy_to_each():
    assert sum_bytes(1000, 2, 4) == 4 * 3 * 2000
    assert sum_bytes(1_000_000, 2, 4) == 2 * 3 * 2_000_000
    assert sum_bytes(1_000_000, 2, 2) == 2 * 2_000_000
