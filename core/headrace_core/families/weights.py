"""A network's weights as a tree: each tensor of the checkpoint, its shape, its place in the network, and who owns it.

What checks a checkpoint before anything is allocated, what builds the network, counts its bytes or cuts it for ranks
reads this tree; a tensor's name stands in its family's file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Part(Enum):
    """What a weight is in the network, whatever its family calls it."""

    EMBEDDING = "embedding"
    FINAL_NORM = "final norm"
    HEAD = "head"
    ATTENTION_NORM = "attention norm"
    FEED_FORWARD_NORM = "feed-forward norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "attention output"
    OUTPUT_BIAS = "attention output's bias"
    QUERY_NORM = "query norm"
    """Of each head, or of the query's latent."""
    KEY_NORM = "key norm"
    QUERY_DOWN = "query's latent"
    QUERY_DOWN_BIAS = "query's latent's bias"
    QUERY_UP = "query from its latent"
    LATENT = "latent of keys and values, and rope key"
    LATENT_BIAS = "latent's bias"
    LATENT_NORM = "latent norm"
    LATENT_UP = "keys and values from their latent"
    INDEX_QUERY = "indexer's query from the query's latent"
    INDEX_KEY = "indexer's key"
    INDEX_KEY_NORM = "indexer's key norm"
    INDEX_KEY_NORM_BIAS = "indexer's key norm's bias"
    INDEX_HEADS = "weights of the indexer's heads"
    ROUTER = "router"
    ROUTER_BIAS = "router's correction bias"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    SHARED_GATE = "shared experts' gate"
    SHARED_UP = "shared experts' up"
    SHARED_DOWN = "shared experts' down"
    MTP_EMBEDDING_NORM = "multi-token prediction's embedding norm"
    MTP_HIDDEN_NORM = "multi-token prediction's hidden norm"
    MTP_JOIN = "multi-token prediction's projection"
    MTP_NORM = "multi-token prediction's final norm"


class Place(NamedTuple):
    """Where in a layer, or outside of all, a weight belongs; `expert` of a mixture's routed experts."""

    part: Part
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """How ranks share a weight: side `axis` is `num_pieces` equal pieces, heads or columns, which nobody cuts."""

    axis: int
    num_pieces: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Indices `start` to `stop` - 1 of side `axis`."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor that the network needs.

    `split` None: each rank owns all of it. Where experts are spread over ranks, one with `place.expert` is that
    expert's owners', whole, and `split` is for those that share one. `is_float32`: kept so whatever the compute type.
    """

    name: str
    shape: tuple[int, ...]
    place: Place
    split: Split | None = None
    is_float32: bool = False

    def shard(self, rank: int, num_ranks: int) -> Shard | None:
        """Return what rank `rank` of `num_ranks` owns, None: all. With fewer pieces than ranks several own the same.

        Raises:
            ValueError: the pieces do not divide among the ranks; names the weight.
        """
        if self.split is None:
            return None
        axis, pieces = self.split.axis, self.split.num_pieces
        if pieces % num_ranks and num_ranks % pieces:
            raise ValueError(f"{self.name}: {pieces} pieces of side {axis} do not divide among {num_ranks} ranks")
        width = self.shape[axis] // pieces
        first, count = rank * pieces // num_ranks, max(1, pieces // num_ranks)
        return Shard(axis, first * width, (first + count) * width)


@dataclass(frozen=True, slots=True)
class WeightTree:
    """The weights outside of layers, and those of each layer; a module for multi-token prediction is the last layer.

    Made as they are asked for, since a config may speak of more than memory holds the names of.
    """

    outside: tuple[Weight, ...]
    num_layers: int
    layer: Callable[[int], Iterator[Weight]]
    """Yields the weights of the layer of an index."""
    root: str = ""
    """What every name begins with."""

    def __iter__(self) -> Iterator[Weight]:
        """Yield all weights."""
        yield from self.outside
        for index in range(self.num_layers):
            yield from self.layer(index)
