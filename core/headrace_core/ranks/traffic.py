"""What ranks send one another in a step, in bytes, by formula: for plans, and held against what they count themselves.

Letters: T tokens, N hidden, K experts per token, S shared experts, E experts, V vocabulary, R ranks, TP ranks of a
lane. All figures are what the ranks send together; a rank sends an even share of them, but of logits, which go to
rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace_core.families.config import ModelConfig
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.sharding import ExpertsForm, Sharding

LARGE_SUM_BYTES = 64 * 1024
"""From here on a sum over more than two ranks is cut into pieces: two meetings cost more than a smaller one's bytes."""
_COUNT_BYTES, _NUMBER_BYTES, _CHOICE_BYTES = 8, 4, 12
"""A count of rows; an expert's number with a token that travels to it; a choice, number and weight, to all ranks."""
_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that all ranks together send in a step: for all its layers' attention and dense layers, and so on."""

    embedding: float
    attention: float
    dense: float
    experts: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.embedding + self.attention + self.dense + self.experts + self.logits


def step_bytes(
    config: ModelConfig,
    sharding: Sharding,
    tokens: Sequence[int],
    logits: Sequence[int],
    itemsize: int,
    dispatch_dtype: DispatchDtype = DispatchDtype.AUTO,
) -> StepBytes:
    """Return what a step sends.

    Args:
        config: the network.
        sharding: how it is shared out; of any rank.
        tokens: T of each lane.
        logits: of each lane the tokens that are sampled after.
        itemsize: bytes of a value of the compute type.
        dispatch_dtype: as what tokens travel to their experts, where they do.
    """
    layout = sharding.layout
    of_lanes = sum(sum_bytes(count * config.hidden_size, itemsize, layout.attention_tp) for count in tokens)
    num_mixtures = sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
    columns = len(layout.vocabulary(0, config.vocab_size))
    others = sum(logits) * config.vocab_size - logits[0] * columns
    return StepBytes(
        embedding=of_lanes,
        attention=config.num_layers * of_lanes,
        dense=(config.num_layers - num_mixtures) * of_lanes,
        experts=num_mixtures * experts_bytes(config, sharding, tokens, itemsize, dispatch_dtype),
        logits=others * _LOGIT_BYTES,
    )


def sum_bytes(num_values: int, itemsize: int, size: int) -> int:
    """Return what a sum over `size` ranks sends: R · (R - 1) of a small one, 2 · (R - 1) of a large one."""
    whole = num_values * itemsize
    if size <= 2 or whole < LARGE_SUM_BYTES:
        return size * (size - 1) * whole
    return 2 * size * (size - 1) * -(-num_values // size) * itemsize


def experts_bytes(
    config: ModelConfig,
    sharding: Sharding,
    tokens: Sequence[int],
    itemsize: int,
    dispatch_dtype: DispatchDtype = DispatchDtype.AUTO,
) -> float:
    """Return what one layer's experts send; where tokens travel to theirs, on average over even choices."""
    layout, moe, size = sharding.layout, config.moe, sharding.layout.size
    count, row = sum(tokens), config.hidden_size * itemsize
    if sharding.experts_form is ExpertsForm.SUMMED:
        return sum_bytes(count * config.hidden_size, itemsize, size)
    to_lane = count * (layout.attention_tp - 1) * row
    if sharding.experts_form is ExpertsForm.GATHERED:
        choices = (moe.num_experts_per_token + moe.num_shared_experts) * _CHOICE_BYTES
        return count * (size - 1) * (2 * row + choices) + to_lane
    sent_row = dispatch_dtype.token_bytes(config.hidden_size, itemsize) + moe.num_experts_per_token * _NUMBER_BYTES
    out = count * ranks_of_token(config, size) * sent_row
    back = count * moe.num_experts_per_token * (size - 1) / size * row
    return size * (size - 1) * size * _COUNT_BYTES + out + back + to_lane


def ranks_of_token(config: ModelConfig, size: int) -> float:
    """Return how many of the other ranks a token travels to, on average, if every choice of experts is as likely."""
    moe = config.moe
    elsewhere = moe.num_experts - moe.num_experts // size
    chosen = moe.num_experts_per_token
    return (size - 1) * (1 - math.comb(elsewhere, chosen) / math.comb(moe.num_experts, chosen))
