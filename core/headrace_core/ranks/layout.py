"""How a model is shared out to the ranks of a group: who holds which heads, experts, rows of the vocabulary, tokens.

Attention is divided by heads over `attention_tp` ranks, a *lane*; a group of R ranks has R / TP lanes, each with
sequences, pages and a cache of its own (data parallelism, DP). Experts are divided over all R ranks, by columns of each
(TP) or by whole experts (EP). Rank r is in lane r // TP, and of its ranks number r % TP.

    rank                     0      1      2      3         attention tp2, experts ep4: R = 4
    lane, and rank in it    0, 0   0, 1   1, 0   1, 1
    heads of 8             0 - 3  4 - 7  0 - 3  4 - 7
    experts of 8           0, 1   2, 3   4, 5   6, 7
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from headrace_core.errors import StartupError
from headrace_core.families.config import MlaShape, ModelConfig


class ExpertsBy(Enum):
    """How experts are divided; the value is how options spell it."""

    COLUMNS = "tp"
    """Each rank has a part of every expert's columns."""
    EXPERT = "ep"
    """Each rank has whole experts."""


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """A group's shape: `attention_tp` ranks share a lane's heads, `num_expert_ranks` the experts, as `experts_by` says.

    Making one raises StartupError BAD_RANKS if attention's degree does not divide the experts', or one is below 1.
    Experts are on as many ranks as attention at least: on fewer they would be whole copies.
    """

    attention_tp: int = 1
    experts_by: ExpertsBy = ExpertsBy.COLUMNS
    num_expert_ranks: int = 1

    def __post_init__(self) -> None:
        tp, size = self.attention_tp, self.num_expert_ranks
        if tp < 1 or size < 1:
            raise StartupError(
                "BAD_RANKS", f"attention over {tp} and experts over {size} ranks: both must be 1 or more"
            )
        if size < tp:
            raise StartupError(
                "BAD_RANKS", f"attention is over {tp} ranks but experts over {size}: spread them over {tp}"
            )
        if size % tp:
            raise StartupError("BAD_RANKS", f"attention's {tp} ranks do not divide the experts' {size}")

    @classmethod
    def parse(cls, attention: str, experts: str) -> ParallelLayout:
        """Return the layout of "tpN" or "dpN" attention and "tpN" or "epN" experts.

        With "tpN", N ranks share a lane's heads, and there are as many lanes as the experts' ranks allow; with "dpN"
        there are N lanes, and as many ranks in each.

        Raises:
            StartupError: BAD_RANKS, with what is wrong.
        """
        attention_kind, attention_degree = _degree("attention", attention, ("tp", "dp"))
        experts_kind, size = _degree("experts", experts, ("tp", "ep"))
        if attention_kind == "dp":
            if size % attention_degree:
                raise StartupError("BAD_RANKS", f"{attention_degree} lanes do not divide the experts' {size} ranks")
            attention_degree = size // attention_degree
        return cls(attention_degree, ExpertsBy(experts_kind), size)

    def __str__(self) -> str:
        return f"attention tp{self.attention_tp} × dp{self.num_lanes}, experts {self.experts_by.value}{self.size}"

    @property
    def size(self) -> int:
        """R, the ranks of the group."""
        return self.num_expert_ranks

    @property
    def num_lanes(self) -> int:
        """Lanes, each of `attention_tp` ranks."""
        return self.size // self.attention_tp

    @property
    def sums(self) -> str:
        """What the bits of exact numerics depend on: how many parts a sum is made of.

        Neither lanes nor, of whole experts, the number of ranks: rows come back to be added one by one.
        """
        experts = str(self.size) if self.experts_by is ExpertsBy.COLUMNS else ""
        return f"attention tp{self.attention_tp} experts {self.experts_by.value}{experts}"

    def lane(self, rank: int) -> int:
        """Return the lane that `rank` is in."""
        return rank // self.attention_tp

    def place(self, rank: int) -> int:
        """Return which of its lane's ranks `rank` is."""
        return rank % self.attention_tp

    def lane_ranks(self, lane: int) -> range:
        """Return the ranks of `lane`."""
        return range(lane * self.attention_tp, (lane + 1) * self.attention_tp)

    def heads(self, rank: int, num_heads: int) -> range:
        """Return the query heads of `rank`; the degree divides them (`check`)."""
        return share(num_heads, self.place(rank), self.attention_tp)

    def kv_heads(self, rank: int, num_kv_heads: int) -> range:
        """Return the key and value heads of `rank`; with fewer heads than ranks several have the same."""
        if num_kv_heads >= self.attention_tp:
            return share(num_kv_heads, self.place(rank), self.attention_tp)
        head = self.place(rank) * num_kv_heads // self.attention_tp
        return range(head, head + 1)

    def vocabulary(self, rank: int, vocab_size: int) -> range:
        """Return the tokens whose rows of embedding and head `rank` has; lanes have copies."""
        return share(vocab_size, self.place(rank), self.attention_tp)

    def check(self, config: ModelConfig) -> None:
        """Refuse a network that can't be shared out so.

        Raises:
            StartupError: BAD_RANKS, with every size that does not divide.
        """
        tp, size, moe = self.attention_tp, self.size, config.moe
        problems: list[str] = []
        if config.num_heads % tp:
            problems.append(f"{config.num_heads} heads by attention's {tp} ranks")
        if not isinstance(config.attention, MlaShape):
            num_kv_heads = config.attention.num_kv_heads
            if num_kv_heads % tp and tp % num_kv_heads:
                problems.append(f"{num_kv_heads} key/value heads by attention's {tp} ranks, or these by them")
        if config.dense_intermediate_size % tp and any(not config.is_moe_layer(i) for i in range(config.num_layers)):
            problems.append(f"{config.dense_intermediate_size} columns of dense layers by attention's {tp} ranks")
        if self.experts_by is ExpertsBy.COLUMNS and moe.intermediate_size % size:
            problems.append(f"{moe.intermediate_size} columns of an expert by {size} ranks")
        if self.experts_by is ExpertsBy.EXPERT and moe.num_experts % size:
            problems.append(f"{moe.num_experts} experts by {size} ranks")
        if problems:
            raise StartupError("BAD_RANKS", f"{self} does not divide this network: {'; '.join(problems)}")

    def contiguous_experts(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """Return for each expert the ranks that hold it, if each rank has as many in a row; all ranks under TP."""
        if self.experts_by is ExpertsBy.COLUMNS:
            return (tuple(range(self.size)),) * num_experts
        return tuple((expert * self.size // num_experts,) for expert in range(num_experts))

    def cached_values(self, config: ModelConfig) -> int:
        """Return the values that a rank caches of a token in one layer: a latent's row, or 2 · n · h / TP.

        A row is c_kv, the rope key and, where there is an indexer, its key: every head's, so each rank of a lane has
        it whole. Keys and values are of heads: n / TP of them, or 1 where that is less.
        """
        shape = config.attention
        if isinstance(shape, MlaShape):
            return shape.kv_lora_rank + shape.rope_dim + (shape.indexer.head_dim if shape.indexer else 0)
        return 2 * len(self.kv_heads(0, shape.num_kv_heads)) * shape.head_dim

    def cache_bytes(self, config: ModelConfig, num_sequences: int, num_tokens: int, itemsize: int) -> int:
        """Return what b = `num_sequences` of s = `num_tokens` each take on the fullest rank, spread evenly over lanes.

        l · b · s · n · h · 2 · itemsize / TP / DP for keys and values, l · b · s · c_kv · itemsize / DP for latents. A
        lane has whole sequences, and pages are not counted: they round s up.
        """
        of_lane = -(-num_sequences // self.num_lanes)
        return config.num_layers * of_lane * num_tokens * self.cached_values(config) * itemsize


def share(count: int, index: int, num_shares: int) -> range:
    """Return share `index` of `count` things in a row; shares differ by one at most."""
    return range(index * count // num_shares, (index + 1) * count // num_shares)


def _degree(what: str, text: str, kinds: tuple[str, str]) -> tuple[str, int]:
    kind, number = text[:2], text[2:]
    if kind not in kinds or not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise StartupError(
            "BAD_RANKS", f"{what} {text!r}: say {kinds[0]}N or {kinds[1]}N, N ranks, such as {kinds[0]}2"
        )
    return kind, int(number)
