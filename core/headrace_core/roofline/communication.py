"""How a worker's GPUs divide the work, and what they must tell each other: bytes per GPU, as formulas.

A worker has `tp*dp` GPUs. Attention: `dp` groups hold different sequences, in each `tp` GPUs share the heads. Experts:
`ep` groups hold different experts, in each `n/ep` GPUs share each expert's width.

    dp = 1           tokens are on every GPU already; what experts give is summed in an all-reduce, for any ep
    dp > 1, ep = 1   every token goes to every GPU (all-gather), sums come back (reduce-scatter)
    dp > 1, ep > 1   every token goes to the ranks that hold its experts, once to each (all-to-all), and back

An exchange between nodes is DeepEP's: a token crosses the network once for each node that wants it, and is passed on
inside; what comes back is summed inside a node first. With FP8 weights a token travels in FP8, with a float32 for each
128 values, and what comes back is BF16.

An all-reduce of x bytes over g GPUs moves 2x(g-1)/g bytes into each and out of each (ring, or two-phase). However few
they are, it starts and makes 2(g-1) hops one after the other: `LINK_LATENCY`, as NCCL's own tuning model has it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Degrees of tensor and data parallelism of attention, and of expert parallelism.

    Raises:
        ValueError: One is below 1, or `ep` does not divide `tp*dp`.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.dp, self.ep) < 1 or self.num_gpus % self.ep:
            raise ValueError(f"tp {self.tp}, dp {self.dp}, ep {self.ep}: all at least 1, and ep a divisor of tp*dp")

    @property
    def num_gpus(self) -> int:
        """GPUs of one worker."""
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"TP{self.tp} DP{self.dp} EP{self.ep}"


ONE_GPU = Parallelism()

# Symbols, beside those of `operations`: `A` tokens of all GPUs, `T` of one; `own` tokens of one GPU when those that tp
# GPUs share are counted once; `exchange` 1 if tokens travel to experts by all-to-all, else 0.

EXCHANGE = "min(dp-1, 1)*min(ep-1, 1)"
REMOTE_RANKS = "ep*(1-pow(1-1/ep, K))*(ep-1)/ep"
"""Ranks other than its own that hold an expert of a token, expected, if experts are spread evenly."""

ATTENTION_REDUCE = "2*(tp-1)/tp*T*N*a"
DENSE_REDUCE = "2*(tp-1)/tp*T*N*a"
DISPATCH = "exchange*own*remote*hot*(n/ep)*N*q + (1-exchange)*(dp-1)/dp*A*N*a"
COMBINE = "exchange*own*remote*hot*N*a + (1-exchange)*(n-1)/n*A*N*a + (tp-1)/tp*T*N*a"
VOCABULARY_GATHER = "(tp-1)/tp*L*V*tp*4"

CHOICES = "exchange*K"
"""How many ranks a token of an exchange may choose; 0: what is sent goes to each GPU of the span for itself."""
ONCE_A_NODE = (
    "pow((1-pow(1-1/max(1, span/domain), max(1, choices)))"
    "/(domain*(1-pow(1-1/max(1, span), max(1, choices)))), min(1, choices))"
)
"""Copies of a token that cross to other nodes, one for each, over those that would cross to other nodes' ranks."""

ALL_REDUCE_HOPS = "2*(tp-1)"
DISPATCH_HOPS = "exchange + (1-exchange)*(dp-1)"
COMBINE_HOPS = "exchange + (1-exchange)*(n-1) + (tp-1)"
VOCABULARY_HOPS = "tp-1"
"""Hops that follow each other: one in an exchange, in which everybody sends to everybody; g-1 in half an all-reduce."""

LINK_LATENCY = "runs*min(1, hops)*(start + hop*hops*min(1, (domain-1)/max(1, span-1)))"
NETWORK_LATENCY = "runs*min(1, hops)*min(1, max(0, span-domain))*(start + network_hop*min(2, hops))"
"""Seconds that collectives take however few bytes they move. Between nodes at least one hop there, and one back."""

CROSSING = "max(max(0, span-domain)/max(1, span-1), 1-min(span, 1))"
"""Part of an exchange among `span` GPUs that leaves a node of `domain` GPUs; `span` 0: all of it, to another worker."""
