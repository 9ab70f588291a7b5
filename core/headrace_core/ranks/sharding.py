"""Which weights of a network, and which part of each, a rank of a group keeps.

    weight                               divided over
    heads: query, key, value, output     the lane's ranks
    dense layers' columns                the lane's ranks
    vocabulary: embedding, head          the lane's ranks
    experts by columns, shared ones too  all ranks
    whole experts                        their owners
    shared experts beside whole ones     nobody where tokens travel, all ranks by columns where sums do
    all else: latents, norms, router     nobody

Lanes hold copies of what a lane's ranks divide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from headrace_core.expert_moves import Slots
from headrace_core.families.weights import Part, Shard, Weight, WeightTree
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout, share

Owners = tuple[tuple[int, ...], ...]
"""For each expert of a layer the ranks that hold it: one, or several, each with a replica."""

_VOCABULARY = frozenset({Part.EMBEDDING, Part.HEAD})
_SHARED = frozenset({Part.SHARED_GATE, Part.SHARED_UP, Part.SHARED_DOWN})


class ExpertsForm(Enum):
    """What travels for the experts of a layer."""

    SUMMED = "sums"
    """All ranks have all tokens: each adds up what its experts, or its columns of them, make of them; sums travel."""
    GATHERED = "all tokens, and sums back"
    """Every rank has a part of each expert's columns: each lane's tokens travel to all ranks, partial sums back."""
    DISPATCHED = "tokens to their experts, and rows back"
    """A token travels to the ranks of its experts; a row for each of its experts comes back."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """What rank `rank` of `layout` keeps.

    `owners` by layer, for experts that do not lie in a row (`ParallelLayout.contiguous_experts`). With `is_exact`
    whole experts are always dispatched to, so that no bit depends on who holds which.
    """

    layout: ParallelLayout
    rank: int
    is_exact: bool = False
    owners: Mapping[int, Owners] = field(default_factory=dict[int, Owners])

    @property
    def experts_form(self) -> ExpertsForm:
        """What travels."""
        is_one_lane = self.layout.num_lanes == 1
        if self.layout.experts_by is ExpertsBy.COLUMNS:
            return ExpertsForm.SUMMED if is_one_lane else ExpertsForm.GATHERED
        return ExpertsForm.SUMMED if is_one_lane and not self.is_exact else ExpertsForm.DISPATCHED

    def owners_of(self, layer: int, num_experts: int) -> Owners:
        """Return who holds each expert of `layer`."""
        return self.owners.get(layer) or self.layout.contiguous_experts(num_experts)

    def slots_of(self, layer: int, num_experts: int) -> Slots:
        """Return which experts of `layer` each rank holds, rising."""
        owners = self.owners_of(layer, num_experts)
        return tuple(
            tuple(expert for expert, ranks in enumerate(owners) if rank in ranks) for rank in range(self.layout.size)
        )

    def local_experts(self, layer: int, num_experts: int) -> list[int]:
        """Return the experts of `layer` that this rank holds, wholly or its columns of them; rising."""
        return [e for e, ranks in enumerate(self.owners_of(layer, num_experts)) if self.rank in ranks]

    def weights(self, tree: WeightTree) -> Iterator[Weight]:
        """Yield the weights of `tree` that this rank keeps, or keeps a part of."""
        yield from tree.outside
        for index in range(tree.num_layers):
            weights = list(tree.layer(index))
            num_experts = len({weight.place.expert for weight in weights} - {None})
            held = set(self.local_experts(index, num_experts))
            yield from (weight for weight in weights if weight.place.expert is None or weight.place.expert in held)

    def part(self, weight: Weight) -> Shard | None:
        """Return what is kept of `weight`, if this rank keeps any of it; None: all.

        Raises:
            ValueError: its pieces do not divide among the ranks; names the weight.
        """
        layout, place = self.layout, weight.place
        if layout.size == 1 or weight.split is None:
            return None
        if place.part in _VOCABULARY:
            rows = layout.vocabulary(self.rank, weight.split.num_pieces)
            return Shard(weight.split.axis, rows.start, rows.stop)
        if place.expert is not None:
            return weight.shard(self.rank, layout.size) if layout.experts_by is ExpertsBy.COLUMNS else None
        if place.part in _SHARED:
            return self._part_of_shared(weight)
        return weight.shard(layout.place(self.rank), layout.attention_tp)

    def _part_of_shared(self, weight: Weight) -> Shard | None:
        assert weight.split is not None
        if self.layout.experts_by is ExpertsBy.COLUMNS:
            return weight.shard(self.rank, self.layout.size)
        if self.experts_form is ExpertsForm.DISPATCHED:
            return None
        columns = share(weight.split.num_pieces, self.rank, self.layout.size)
        return Shard(weight.split.axis, columns.start, columns.stop)

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Return the shape of what is kept of `weight`, if any is."""
        part = self.part(weight)
        if part is None:
            return weight.shape
        return tuple(part.stop - part.start if axis == part.axis else side for axis, side in enumerate(weight.shape))
