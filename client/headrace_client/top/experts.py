"""How evenly experts are used: the layers where one has most above its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from headrace_client.top.samples import Samples

_MOST_LAYERS = 4


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """A layer's fullest expert: `share` of the layer's tokens, and how often the mean that is."""

    layer: str
    expert: str
    share: float
    ratio: float


def busiest_layers(workers: Sequence[Samples]) -> list[LayerLoad]:
    """Return the most uneven layers, the worst first, over all workers; none where no token was routed."""
    layers: dict[str, Counter[str]] = {}
    for samples in workers:
        found = samples.labelled("headrace_expert_tokens_total", key="layer", of="expert")
        for layer, tokens in found.items():
            layers.setdefault(layer, Counter()).update(tokens)
    loads = [_load(layer, tokens) for layer, tokens in layers.items() if sum(tokens.values())]
    return sorted(loads, key=lambda load: -load.ratio)[:_MOST_LAYERS]


def _load(layer: str, tokens: Counter[str]) -> LayerLoad:
    ((expert, most),) = tokens.most_common(1)
    share = most / sum(tokens.values())
    return LayerLoad(layer, expert, share, share * len(tokens))
